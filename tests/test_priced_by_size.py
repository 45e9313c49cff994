"""What a goal of size chooses is timed; what cannot be timed is not chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from tables import conv_layer

from onnx_lowrank.candidates import Candidate, keep
from onnx_lowrank.chain import Chain
from onnx_lowrank.goals import KeepParams
from onnx_lowrank.latency.chains import Dropped, Progress
from onnx_lowrank.latency.messages import Subject
from onnx_lowrank.latency.pieces import Job
from onnx_lowrank.layer import Layer
from onnx_lowrank.progress import Phases
from onnx_lowrank.search.prediction import size_problem
from onnx_lowrank.search.pricing import priced_by_size
from onnx_lowrank.search.rules import rule_for
from onnx_lowrank.search.table import Row
from onnx_lowrank.settings import Settings

GOAL = KeepParams(0.5)
SETTINGS = Settings(goal=GOAL)


@dataclass
class Priced:
    """Prices a millisecond each, but for the layers and the formats of a layer that it cannot time."""

    fails: frozenset[str]
    source: str = "measured"
    timed: int = 0
    priced: int = 0
    disturbed: int = 0
    dropped: list[Dropped] = field(default_factory=list[Dropped])

    def price(self, jobs: Sequence[Job], progress: Progress | None = None) -> list[float | None]:
        names = [f"{job.layer.key} {job.chain.method if job.chain else 'keep'}" for job in jobs]
        if progress is not None:
            progress(len(jobs), len(jobs))
        return [None if name in self.fails else 1.0 for name in names]

    def drift(self, layers: Sequence[Layer], model: Subject, model_ms: float, budget_s: float) -> float:
        raise NotImplementedError


def row(key: str) -> Row:
    """A layer of 100 weights: svd is better than cp at every size."""
    layer = conv_layer(key, np.ones((1, 4, 4, 3, 3), np.float32))
    kept = replace(keep(layer), params=100, macs=100.0)

    def option(method: str, size: int, error: float) -> Candidate:
        chain = replace(Chain.unfactored(layer.shape), method=method)
        return Candidate(key, method, (size,), chain, error, error, size, float(size), float(size))

    options = [option("svd", size, 0.1 - size / 1000) for size in (20, 40, 60)]
    return Row(layer, (kept, *options, *(option("cp", size, 0.2 - size / 1000) for size in (20, 40, 60))), {})


def sizes(rows: Sequence[Row]) -> tuple[float, float]:
    return 200.0, float(sum(row.keep.params for row in rows if row.factorable))


@pytest.mark.parametrize(
    ("fails", "chosen"),
    [
        ([], ["a svd", "b svd"]),
        (["a svd"], ["a cp", "b svd"]),
        (["a svd", "b svd"], ["a cp", "b cp"]),
        (["a svd", "a cp"], ["b svd"]),
        (["a keep"], ["b svd"]),
    ],
)
def test_what_cannot_be_timed_is_not_chosen(fails: Sequence[str], chosen: Sequence[str]) -> None:
    rows = [row("a"), row("b")]
    timer, rule = Priced(frozenset(fails)), rule_for(SETTINGS, rows, None)
    timed = priced_by_size(rows, SETTINGS, rule, timer, sizes, Phases())
    picked = rule(size_problem(timed, GOAL, *sizes(timed)))
    assert [f"{c.key} {c.method}" for c in picked] == chosen
    assert all(c.ms == 1.0 for c in picked)


def test_the_same_is_chosen_before_and_after() -> None:
    rows = [row("a"), row("b")]
    rule = rule_for(SETTINGS, rows, None)
    before = rule(size_problem(rows, GOAL, *sizes(rows)))
    timed = priced_by_size(rows, SETTINGS, rule, Priced(frozenset()), sizes, Phases())
    assert [c.name for c in rule(size_problem(timed, GOAL, *sizes(timed)))] == [c.name for c in before]
