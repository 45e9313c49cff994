"""A model that misses its goal of speed once it is finished: the search goes on from what was measured of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from benches import DENSE_MS, Scripted, loop_over
from builders import model, value
from roads import low_rank, node, on_one_thread, save

from onnx_lowrank.allocators.knapsack import knapsack
from onnx_lowrank.goals import Goal, LatencyMs, Speedup
from onnx_lowrank.pipeline import optimize
from onnx_lowrank.report import assemble
from onnx_lowrank.report.model import Latency
from onnx_lowrank.search.analysis import Analysis
from onnx_lowrank.search.attempt import Outcome
from onnx_lowrank.target import InputShapes

ALONE = {"a": 5.0, "b": 5.0, "c": 5.0}


def after_a_miss(
    goal: Goal, bench: Scripted, low_rank: float, alone: Mapping[str, float] = ALONE
) -> tuple[Outcome, Outcome | None]:
    """What the loop finds, and what it finds when that model turns out to be only `low_rank` times as fast."""
    loop = loop_over(alone, bench, lambda _: 0.0, knapsack)
    first = loop.run(goal, 100.0, 100.0)
    return first, loop.nearer(goal, first.best, 1.0, low_rank)


@pytest.mark.parametrize("goal", [Speedup(1.15), LatencyMs(3 * DENSE_MS / 1.15)])
def test_one_chain_more_is_taken(goal: Goal) -> None:
    first, second = after_a_miss(goal, Scripted(3, ALONE), 1.1)
    assert sum(c.chain is not None for c in first.best.chosen) == 1
    assert second is not None
    assert second.reached
    assert sum(c.chain is not None for c in second.best.chosen) == 2


def test_none_where_nothing_is_faster() -> None:
    assert after_a_miss(Speedup(1.8), Scripted(1, ALONE), 1.7, {"a": 5.0})[1] is None


def test_none_where_the_next_model_misses_too() -> None:
    bench = Scripted(2, {"a": 5, "b": 14.9})
    first, second = after_a_miss(Speedup(1.3), bench, 1.2, {"a": 5.0, "b": 6.0})
    assert first.reached
    assert second is None


def test_none_where_the_next_model_cannot_be_timed() -> None:
    bench = Scripted(3, ALONE, broken=["model+a+b", "model+a+c", "model+b+c"])
    assert after_a_miss(Speedup(1.15), bench, 1.1)[1] is None


@pytest.mark.usefixtures("quick")
def test_the_finished_model_was_slower_than_the_search_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large product, so that no noise of the machine hides what a smaller rank saves."""
    weight = low_rank((1024, 1024), 32, seed=0, noise=0.04)
    large = model([node("MatMul", "x w", "y")], [value("x", ["N", 1024])], [value("y", ["N", 1024])], {"w": weight})
    settings = on_one_thread(Speedup(1.5), shapes=[InputShapes({"x": (64, 1024)})])
    measured, told = assemble._latency, list[Latency]()  # pyright: ignore[reportPrivateUsage] - what it says is changed

    def slow_at_first(analysis: Analysis, path: Path) -> Latency:
        found = measured(analysis, path)
        if not told:
            found = replace(found, speedup=1.25, low_rank_speedup=1.25, ci95=(1.2, 1.3))
        told.append(found)
        return found

    monkeypatch.setattr(assemble, "_latency", slow_at_first)
    report, _ = optimize(save(large, tmp_path), tmp_path / "out.onnx", settings)
    assert len(told) == 2
    assert report.latency == told[1]
    assert "the first model found was 1.250x as fast when it was finished: a faster one was looked for" in report.notes
