"""The bench: choices become a model file."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from onnx_lowrank.chain import Fit
from onnx_lowrank.decomposition import Decomposition
from onnx_lowrank.graph import io
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.pass_manager import PassManager, PassRecord
from onnx_lowrank.passes.factor import Factor
from onnx_lowrank.plan import REFIT, Plan
from onnx_lowrank.progress import Phases
from onnx_lowrank.refit import arrays, chosen_layers, refit
from onnx_lowrank.regression import Refitted
from onnx_lowrank.search.calibrated import CalibratedTable
from onnx_lowrank.search.factorizations import FactorizationCache
from onnx_lowrank.search.racer import Racer


@dataclass
class Bench:
    """Realises plans.

    Args:
        original: The user's file.
        graph: The normalized model; it is as before after every realisation.
        methods: Decompositions by name.
        cache: Factorizations made so far.
        racer: Times the models made.
        folder: Where they are written.
        deadline: `time.monotonic()` at which searching should end.
        table: The calibrated table, or None without data.
        phases: Timed and shown.
    """

    original: Path
    graph: Graph
    methods: Mapping[str, Decomposition]
    cache: FactorizationCache
    racer: Racer
    folder: Path
    deadline: float = math.inf
    table: CalibratedTable | None = None
    phases: Phases = field(default_factory=Phases)
    _refitted: dict[str, dict[str, Refitted]] = field(default_factory=dict[str, dict[str, Refitted]], init=False)
    _number: int = field(default=0, init=False)

    @property
    def late(self) -> bool:
        """Whether the time limit is over."""
        return time.monotonic() > self.deadline

    def realise(self, plan: Plan, path: Path | None = None) -> tuple[Path, PassRecord]:
        """Write the model that `plan` describes, without refit; None: into the folder, under a name of its own."""
        fits: dict[str, Fit] = {}
        if self.table is not None:
            layers = {layer.key: layer for layer in self.table.layers}
            rewritten = [choice for choice in plan.layers if not choice.keeps]
            fits = {c.key: self.table.arrays(layers[c.key], c.method, c.rank) for c in rewritten}
        return self._written(plan, fits, path)

    def finish(self, plan: Plan, path: Path | None = None) -> tuple[Path, PassRecord]:
        """Write the model that `plan` describes, refitted where there are samples."""
        return self._written(plan, arrays(self.refitted(plan)), path)

    def refitted(self, plan: Plan) -> Mapping[str, Refitted]:
        """Arrays and errors of every layer of `plan` that can be refitted; empty without samples."""
        if self.table is None:
            return {}
        if plan.digest not in self._refitted:
            with self.phases.phase("refit") as advance:
                given = self.table.calibration
                chosen = chosen_layers(self.table.layers, plan, self.methods, self.cache)
                self._refitted[plan.digest] = refit(
                    self.graph, chosen, given.samples, given.target, self.folder, advance, regress=plan.fit == REFIT
                )
        return self._refitted[plan.digest]

    def _written(self, plan: Plan, fits: Mapping[str, Fit], path: Path | None) -> tuple[Path, PassRecord]:
        self._number += 1
        path = path or self.folder / f"trial{self._number}.onnx"
        if plan.changes_nothing:
            io.copy(self.original, path)
            return path, PassRecord(Factor.name, {}, modified=False, seconds=0.0, notes=())
        before = self.graph.snapshot()
        # Edit a copy: the surveyed layers hold on to the present scopes, and would to the new weights in them.
        self.graph.restore(before)
        try:
            (record,) = PassManager((Factor(plan, self.methods, self.cache, fits),)).run(self.graph)
            io.save(self.graph, path)
        finally:
            self.graph.restore(before)
        return path, record
