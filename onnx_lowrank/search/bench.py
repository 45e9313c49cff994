"""The bench: choices become a model file."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from onnx_lowrank.decomposition import Decomposition
from onnx_lowrank.graph import io
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.pass_manager import PassManager, PassRecord
from onnx_lowrank.passes.factor import Factor
from onnx_lowrank.plan import Plan
from onnx_lowrank.search.factorizations import FactorizationCache
from onnx_lowrank.search.racer import Racer


@dataclass
class Bench:
    """Realises plans.

    Args:
        graph: The normalized model; it is as before after every realisation.
        methods: Decompositions by name.
        cache: Factorizations made so far.
        racer: Times the models made.
        folder: Where they are written.
        deadline: `time.monotonic()` at which searching should end.
    """

    graph: Graph
    methods: Mapping[str, Decomposition]
    cache: FactorizationCache
    racer: Racer
    folder: Path
    deadline: float = math.inf
    _number: int = field(default=0, init=False)

    @property
    def late(self) -> bool:
        """Whether the time limit is over."""
        return time.monotonic() > self.deadline

    def realise(self, plan: Plan, name: str | None = None) -> tuple[Path, PassRecord]:
        """Write the model that `plan` describes into the folder, as `name` or under a name of its own."""
        self._number += 1
        path = self.folder / (name or f"trial{self._number}.onnx")
        before = self.graph.snapshot()
        # Edit a copy: the surveyed layers hold on to the present scopes, and would to the new weights in them.
        self.graph.restore(before)
        try:
            (record,) = PassManager((Factor(plan, self.methods, self.cache),)).run(self.graph)
            io.save(self.graph, path)
        finally:
            self.graph.restore(before)
        return path, record
