"""The guard: chains that gain nothing in the finished model are taken out again, and no others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from benches import Scripted, loop_over, rows

from onnx_lowrank.candidates import Candidate, Problem
from onnx_lowrank.goals import Goal, KeepMacs, MaxError, Speedup
from onnx_lowrank.report.build import layer_rows
from onnx_lowrank.search.attempt import Outcome
from onnx_lowrank.search.guard import MOST_ALONE


def searched(
    goal: Goal, alone: Mapping[str, float], bench: Scripted, error_of: Callable[[Path], float] = lambda _: 0.0
) -> Outcome:
    """What the loop makes of a rule that always takes every chain."""

    def all_chains(_: Problem) -> tuple[Candidate, ...]:
        return tuple(next(option for option in options if option.chain is not None) for options in every)

    every = [row.options for row in rows(alone)]
    return loop_over(alone, bench, error_of, all_chains).run(goal, 100.0, 100.0)


def test_chains_that_gain_nothing_are_put_back_together() -> None:
    bench = Scripted(3, {"a": 11, "b": 10, "c": 5})
    found = searched(Speedup(1.1), {"a": 9.8, "b": 9.9, "c": 5}, bench)
    assert (found.reached, found.reason, found.put_back) == (True, "measured", ("a", "b"))
    assert [c.method for c in found.best.chosen] == ["keep", "keep", "svd"]
    assert bench.raced == ["model+c"]
    assert found.best.race is not None
    assert found.best.race.timings[2].median_ms == 25
    assert found.best.predicted_ms == pytest.approx(20 + 5 * 26 / 24.7)  # corrected by the one before


def test_where_that_does_not_help_they_are_tried_alone_those_first_that_save_least() -> None:
    bench = Scripted(4, {"a": 11, "b": 3, "c": 5, "d": 12})
    found = searched(Speedup(1.1), {"a": 9.8, "b": 9.9, "c": 5, "d": 9.7}, bench)
    assert found.put_back == ("a", "d")
    assert bench.raced == ["model+c", "model+a+c+d", "model+b+c+d", "model+b+c"]
    assert found.best.path == Path("model+b+c")


def test_all_but_one_put_back_are_not_tried_all_again() -> None:
    bench = Scripted(2, {"a": 11, "b": 7})
    found = searched(Speedup(1.05), {"a": 9.9, "b": 9.8}, bench)
    assert found.put_back == ("a",)
    assert bench.raced == ["model", "model+b"]


def test_the_number_of_trials_is_bounded() -> None:
    keys = "abcdefgh"
    bench = Scripted(8, dict.fromkeys(keys, 8.0))
    found = searched(Speedup(1.1), dict.fromkeys(keys, 9.9), bench)
    assert found.put_back == ()
    assert found.best.path == Path("model+" + "+".join(keys))
    assert len(bench.raced) == 1 + MOST_ALONE


def test_a_goal_that_is_missed_is_guarded_too() -> None:
    found = searched(Speedup(3), {"a": 9.8, "b": 5}, Scripted(2, {"a": 11, "b": 5}))
    assert (found.reached, found.put_back) == (False, ("a",))
    assert found.reason.startswith("best found: 1.333x (1.333 to 1.333) as fast as the original; ")


def test_what_is_put_back_may_reach_the_goal() -> None:
    found = searched(Speedup(1.3), {"a": 9.8, "b": 5}, Scripted(2, {"a": 11, "b": 5}))
    assert (found.reached, found.reason, found.put_back) == (True, "measured", ("a",))


def test_no_goal_is_missed_by_putting_back() -> None:
    """Without the chain the model is slower by less than counts, and just below the goal."""
    found = searched(Speedup(30 / 24.95), {"a": 9.8, "b": 9.4, "c": 9.4}, Scripted(3, {"a": 9.95, "b": 5, "c": 10}))
    assert (found.reached, found.put_back) == (True, ())


@pytest.mark.parametrize(("error", "put_back"), [(0.01, ("a",)), (0.2, ())])
def test_the_error_limit_holds_for_the_model_without_the_chains(error: float, put_back: tuple[str, ...]) -> None:
    bench = Scripted(2, {"a": 10, "b": 5})
    found = searched(MaxError(0.1), {"a": 9.8, "b": 5}, bench, lambda path: error if path == Path("model+b") else 0.02)
    assert (found.reached, found.put_back) == (True, put_back)
    assert "model+b" in bench.finished


def test_a_model_that_is_slower_is_not_refitted_for_it() -> None:
    bench = Scripted(2, {"a": 9, "b": 5})
    found = searched(MaxError(0.1), {"a": 9.8, "b": 5}, bench)
    assert found.put_back == ()
    assert (bench.raced[-1], set(bench.finished)) == ("model+b", {"model+a+b"})


def test_goals_of_size_put_nothing_back() -> None:
    bench = Scripted(2, {"a": 12, "b": 5})
    found = searched(KeepMacs(0.5), {"a": 11, "b": 5}, bench)
    assert (found.best.path, found.put_back, bench.raced) == (Path("model+a+b"), (), [])


def test_a_trial_that_cannot_be_timed_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    bench = Scripted(2, {"a": 11, "b": 5}, broken=["model+b"])
    found = searched(Speedup(1.1), {"a": 9.8, "b": 5}, bench)
    assert (found.best.path, found.reached, found.put_back) == (Path("model+a+b"), True, ())
    assert "chains stay that might be spared: the measuring process died" in caplog.text


def test_nothing_is_tried_when_time_is_up() -> None:
    bench = Scripted(2, {"a": 11, "b": 5}, late=True)
    assert searched(Speedup(1.1), {"a": 9.8, "b": 5}, bench).put_back == ()
    assert bench.raced == []


def test_the_report_says_what_was_put_back() -> None:
    table = rows({"a": 9.8, "b": 5})
    chosen = [table[0].keep, table[1].options[1]]
    names = {"a": "first", "b": "second"}
    told = layer_rows(table, (), chosen, names, by_time=True, source="measured", put_back=("a",))
    assert [(row.name, row.decision) for row in told] == [("first", "kept"), ("second", "factorized")]
    assert told[0].reason == "put back: the finished model is no slower without its chain"
    assert "put back" not in told[1].reason
