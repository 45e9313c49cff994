"""A model that misses its goal of speed once it is finished: the search goes on from what was measured of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from benches import DENSE_MS, Scripted, loop_over
from builders import model, value
from roads import low_rank, node, on_one_thread, save

from onnx_lowrank.allocators.knapsack import knapsack
from onnx_lowrank.candidates import Candidate, Problem
from onnx_lowrank.decomposition import Rank
from onnx_lowrank.goals import Goal, LatencyMs, Speedup
from onnx_lowrank.latency.child import MeasuringError
from onnx_lowrank.pipeline import apply, optimize
from onnx_lowrank.plan import Plan
from onnx_lowrank.report import assemble
from onnx_lowrank.report.model import Latency, Report
from onnx_lowrank.search import loop
from onnx_lowrank.search.analysis import Analysis
from onnx_lowrank.search.attempt import Outcome
from onnx_lowrank.target import InputShapes

ALONE = {"a": 5.0, "b": 5.0, "c": 5.0}


def after_a_miss(
    goal: Goal, bench: Scripted, low_rank: float, standing: float, alone: Mapping[str, float] = ALONE
) -> tuple[Outcome, Outcome | None]:
    """What the loop finds, and what it finds when that model turns out to be `low_rank` times as fast."""
    search = loop_over(alone, bench, lambda _: 0.0, knapsack)
    first = search.run(goal, 100.0, 100.0)
    assert first.reached
    return first, search.nearer(goal, first.best, low_rank, standing)


@pytest.mark.parametrize("goal", [Speedup(1.15), LatencyMs(3 * DENSE_MS / 1.15)])
@pytest.mark.parametrize(
    ("low_rank", "standing"),
    [(1.1, 1.1 / 1.15), pytest.param(1.16, 0.97, id="a wide interval"), pytest.param(1.2, 0.9, id="a slower machine")],
)
def test_a_faster_model_is_taken(goal: Goal, low_rank: float, standing: float) -> None:
    first, second = after_a_miss(goal, Scripted(3, ALONE), low_rank, standing)
    assert sum(c.chain is not None for c in first.best.chosen) == 1
    assert second is not None
    assert second.reached
    assert sum(c.chain is not None for c in second.best.chosen) == 2


def test_between_a_model_too_fast_and_one_too_slow_half_of_the_layers_are_tried() -> None:
    """The rule's answers are 1.7x and 1.2x; what is wanted lies between them."""
    keys = "abcdefgh"
    bench = Scripted(8, dict.fromkeys(keys, 5.0))
    answers = iter(["abcdefg", "abc"])

    def rule(problem: Problem) -> tuple[Candidate, ...]:
        cut = next(answers)
        return tuple(options[1 if options[0].key in cut else 0] for options in problem.layers)

    found = loop_over(dict.fromkeys(keys, 5.0), bench, lambda _: 0.0, rule).run(Speedup(1.45), 100.0, 100.0)
    assert found.reached
    assert [c.key for c in found.best.chosen if c.chain is not None] == ["a", "b", "c", "f", "g"]
    assert found.best.timed.ratio(0, 2).value == pytest.approx(80 / 55)


def test_a_rule_that_is_no_sum_is_asked_for_what_lies_between() -> None:
    """Parts of two of its choices are none of its choices; and what it measured says which is the best."""
    keys = "abcdefgh"
    bench, asked = Scripted(8, dict.fromkeys(keys, 5.0)), list[float]()
    answers = ["abcdefg", "abc", "bcdefh"]

    def rule(problem: Problem) -> tuple[Candidate, ...]:
        asked.append(problem.budget)
        cut = answers[len(asked) - 1]
        return tuple(options[1 if options[0].key in cut else 0] for options in problem.layers)

    def damage(chosen: Sequence[Candidate]) -> float:
        return 1.0 if any(c.key == "a" and c.chain is not None for c in chosen) else 2.0

    made = loop_over(dict.fromkeys(keys, 5.0), bench, lambda _: 0.0, rule)
    found = replace(made, additive=False).run(Speedup(1.58), 100.0, 100.0)
    assert asked[2] == pytest.approx((45 + 65) / 2)
    assert [c.key for c in found.best.chosen if c.chain is not None] == list("bcdefh")
    measured = replace(made, additive=False, damage=damage)
    asked.clear()
    found = measured.run(Speedup(1.58), 100.0, 100.0)
    assert [c.key for c in found.best.chosen if c.chain is not None] == list("abcdefg")


def test_none_where_nothing_is_faster() -> None:
    assert after_a_miss(Speedup(1.8), Scripted(1, ALONE), 1.7, 0.95, {"a": 5.0})[1] is None


def test_none_where_the_next_model_misses_too() -> None:
    bench = Scripted(2, {"a": 5, "b": 14.9})
    assert after_a_miss(Speedup(1.3), bench, 1.2, 1.2 / 1.3, {"a": 5.0, "b": 6.0})[1] is None


def test_a_model_that_cannot_be_timed_is_told() -> None:
    bench = Scripted(3, ALONE, broken=["model+a+b", "model+a+c", "model+b+c"])
    with pytest.raises(MeasuringError):
        after_a_miss(Speedup(1.15), bench, 1.1, 0.95)


class Told:
    """Stands where the finished model is timed: what the first and the second one are measured to be worth."""

    def __init__(self, *speedups: float | MeasuringError) -> None:
        self.speedups, self.latencies, self.ranks = list(speedups), list[Latency](), list[Rank]()
        self.measure = assemble._latency  # pyright: ignore[reportPrivateUsage] - what it says is changed

    def __call__(self, analysis: Analysis, path: Path) -> Latency:
        found, speedup = self.measure(analysis, path), self.speedups.pop(0)
        self.ranks.append(analysis.outcome.best.plan.layers[0].rank)
        if isinstance(speedup, MeasuringError):
            raise speedup
        ends = (0.99 * speedup, 1.01 * speedup)
        self.latencies.append(replace(found, speedup=speedup, low_rank_speedup=speedup, ci95=ends))
        return self.latencies[-1]


def finished(told: Told, folder: Path, patch: pytest.MonkeyPatch) -> tuple[Report, Plan]:
    """A large product, so that no noise of the machine hides what a smaller rank saves; every race reaches the goal."""
    patch.setattr(loop, "standing", lambda *_: (True, 1.0))
    weight = low_rank((1024, 1024), 32, seed=0, noise=0.04)
    large = model([node("MatMul", "x w", "y")], [value("x", ["N", 1024])], [value("y", ["N", 1024])], {"w": weight})
    settings = on_one_thread(Speedup(1.5), shapes=[InputShapes({"x": (64, 1024)})])
    patch.setattr(assemble, "_latency", told)
    source = save(large, folder)
    report, plan = optimize(source, folder / "out.onnx", settings)
    apply(source, plan, folder / "again.onnx")
    assert (folder / "again.onnx").read_bytes() == (folder / "out.onnx").read_bytes(), "plan and file belong together"
    assert {path.name for path in folder.iterdir()} == {"model.onnx", "out.onnx", "again.onnx"}
    return report, plan


NOTE = "the first model found was 1.250x as fast when it was finished: a faster one was looked for"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("second", [2.0, 1.4])
def test_the_second_model_is_written_where_it_is_faster(
    second: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told(1.25, second)
    report, plan = finished(told, tmp_path, monkeypatch)
    assert report.latency == told.latencies[1]
    assert report.goal.reached == (second == 2.0)
    assert NOTE in report.notes
    (layer,) = plan.layers
    assert layer.rank < told.ranks[0]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("second", [1.2, MeasuringError("died", None)])
def test_the_first_model_is_written_where_the_second_is_no_better(
    second: float | MeasuringError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told(1.25, second)
    report, _ = finished(told, tmp_path, monkeypatch)
    assert report.latency == told.latencies[0]
    assert not report.goal.reached
    assert NOTE not in report.notes
