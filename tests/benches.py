"""A bench on which models take what they are said to take: what the search makes of times, without any."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
from tables import conv_layer

from onnx_lowrank.allocators import Allocator
from onnx_lowrank.candidates import Candidate, keep
from onnx_lowrank.chain import Chain
from onnx_lowrank.latency.child import MeasuringError
from onnx_lowrank.latency.measure import Paired, Timing
from onnx_lowrank.latency.turns import Clock
from onnx_lowrank.pass_manager import PassRecord
from onnx_lowrank.plan import Choice, Plan
from onnx_lowrank.search.bench import Bench
from onnx_lowrank.search.loop import Loop
from onnx_lowrank.search.prediction import Prediction
from onnx_lowrank.search.racer import Contestant
from onnx_lowrank.search.table import Row

DENSE_MS = 10.0
ROUNDS = 9
ORIGINAL, NORMALIZED = Path("original"), Path("normalized")


@dataclass
class Scripted:
    """A bench and a racer in one: a model takes what its layers take, 10 ms each, or what is said of their chains.

    Args:
        layers: How many.
        chains: Layer -> milliseconds its chain takes in the model.
        broken: Models that cannot be timed.
    """

    layers: int
    chains: Mapping[str, float]
    broken: Sequence[str] = ()
    late: bool = False
    raced: list[str] = field(default_factory=list[str])
    finished: list[str] = field(default_factory=list[str])

    @property
    def racer(self) -> Scripted:
        return self

    def realise(self, plan: Plan) -> tuple[Path, PassRecord]:
        rewritten = [choice.key for choice in plan.layers if not choice.keeps]
        return Path("+".join(["model", *rewritten])), PassRecord("factor", {}, modified=True, seconds=0.0, notes=())

    def finish(self, plan: Plan) -> tuple[Path, PassRecord]:
        path, record = self.realise(plan)
        self.finished.append(str(path))
        return path, record

    def best_level(self, path: Path) -> Contestant:
        return Contestant(path, "all")

    def race(self, contestants: Sequence[Contestant]) -> Paired:
        names = [str(contestant.path) for contestant in contestants]
        if set(names) & set(self.broken):
            raise MeasuringError("died", None)
        if len(names) == 2:
            self.raced.append(names[1])
        times = [self.ms(Path(name)) for name in names]
        timings = tuple(Timing(ms, (ms, ms), (ms,) * ROUNDS) for ms in times)
        ratios = tuple(times[0] / ms for ms in times)
        return Paired(timings, ratios, tuple((r, r) for r in ratios), ROUNDS, Clock.CPU, disturbed=False)

    def trial(self, rivals: Sequence[Contestant], path: Path) -> tuple[Paired, str]:
        final = self.best_level(path)
        return self.race([*rivals, final]), final.level

    def ms(self, path: Path) -> float:
        rewritten = str(path).split("+")[1:]
        return self.layers * DENSE_MS + sum(self.chains[key] - DENSE_MS for key in rewritten)


def rows(alone: Mapping[str, float]) -> list[Row]:
    """Layers with one chain each, which alone takes so many milliseconds."""
    found: list[Row] = []
    for key, ms in alone.items():
        layer = conv_layer(key, np.zeros((1, 4, 4, 1, 1), np.float32))
        chain = Candidate(key, "svd", (1,), Chain("svd", (), ""), 0.1, 0.1, 1, 1.0, 1.0, ms)
        found.append(Row(layer, (keep(layer).timed(DENSE_MS), chain), {}))
    return found


def loop_over(alone: Mapping[str, float], bench: Scripted, error_of: Callable[[Path], float], rule: Allocator) -> Loop:
    """The loop over a table of such layers."""

    def plan_of(chosen: Sequence[Candidate]) -> Plan:
        return Plan("", tuple(Choice(c.key, c.key, c.method, c.rank) for c in chosen), ())

    original, normalized = Contestant(ORIGINAL, "all"), Contestant(NORMALIZED, "all")
    prediction = Prediction(rows(alone), bench.layers * DENSE_MS)
    baseline = bench.race([original, normalized])
    bench.raced.clear()
    return Loop(cast(Bench, bench), prediction, baseline, rule, original, normalized, plan_of, error_of)
