"""The table survives processes and damage; prices are paired, remembered and complete; intervals cover."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import conv_model
from test_latency_table import ms

from onnx_lowrank.latency import circumstances
from onnx_lowrank.latency.child import shared
from onnx_lowrank.latency.circumstances import Circumstances, lowered_by
from onnx_lowrank.latency.measure import Until, in_turns, joined, steady_clock
from onnx_lowrank.latency.race import SITTING_ROUNDS, SITTINGS, common_clock, race, race_repeatedly
from onnx_lowrank.latency.table import LatencyTable, Record
from onnx_lowrank.latency.turns import Clock, Now, clock_for, one_round, thread_clock, tick_s
from onnx_lowrank.latency.worker import OverSamples
from onnx_lowrank.runtime import open_session
from onnx_lowrank.target import Target

ONE = Target(threads=1)
HERE = Circumstances.here(ONE)


class Scripted:
    """A run that takes the times it was told to."""

    def __init__(self, *seconds: float) -> None:
        self._seconds, self._next = seconds, 0

    def seconds(self, now: Now = time.perf_counter) -> float:
        self._next += 1
        return self._seconds[(self._next - 1) % len(self._seconds)]


def test_latencies_of_other_circumstances_are_not_found(tmp_path: Path):
    others = [
        HERE.at("extended"),
        Circumstances.here(Target(threads=2)),
        Circumstances.here(Target("cuda", threads=1)),
        Circumstances.here(Target(threads=1, provider_options={"o": "1"})),
        replace(HERE, device="another"),
        replace(HERE, onnxruntime="1.0.0"),
        replace(HERE, clock="wall"),
        replace(HERE, lowered_by="0.0.0"),
    ]
    with LatencyTable(tmp_path / "t.sqlite") as table:
        for number, where in enumerate(others):
            table.put(where, Record("a", "conv", float(number), 7))
        assert ms(table) is None
        assert [ms(table, where) for where in others] == [float(number) for number in range(len(others))]
        assert table.circumstances() == sorted(others)
    assert Circumstances.here(Target(threads=1, levels=("all",))) == HERE


@pytest.mark.parametrize("allowed", [True, False])
def test_nodes_that_may_run_on_the_cpu_are_other_circumstances(allowed: bool):
    target = Target("openvino", threads=1, provider_options={"o": "1"}, allow_fallback=allowed)
    where = Circumstances.here(target)
    assert (where == Circumstances.here(replace(target, allow_fallback=not allowed))) is False
    assert where.target().allow_fallback is allowed
    assert where.target().provider_options == {"o": "1"}
    assert ("allow_fallback=true" in where.label) is allowed
    assert Circumstances.from_dict(where.to_dict()) == where
    assert Circumstances.here(Target(threads=1, allow_fallback=allowed)) == HERE, "there is nowhere else to run"


@pytest.mark.parametrize(
    "name", ["rewrite.py", "micro_model.py", "runtime.py", "latency/measure.py", "latency/pieces.py"]
)
def test_other_sources_are_other_circumstances(tmp_path: Path, name: str):
    package = Path(circumstances.__file__).parents[1]
    copied = tmp_path / "onnx_lowrank"
    shutil.copytree(package, copied, ignore=shutil.ignore_patterns("__pycache__", "passes", "assets"))
    digest = circumstances.digest_of(copied)
    assert lowered_by() == HERE.lowered_by
    assert HERE.lowered_by.endswith(f"+{digest}")
    (copied / name).write_text((copied / name).read_text() + "# other")
    assert circumstances.digest_of(copied) != digest


def test_a_model_is_as_fast_as_itself_by_definition():
    session = open_session(conv_model((1, 3, 8, 8), (4, 3, 3, 3)).SerializeToString(), ONE)
    feeds = {"x": np.ones((1, 3, 8, 8), np.float32)}
    result = in_turns([session.bind(feeds), session.bind(feeds)], Until(rounds=9, budget_s=0.2))
    assert result.rounds >= 9
    assert result.ratios[0] == 1.0
    assert result.ci95[0] == (1.0, 1.0)


@pytest.mark.parametrize("clock", Clock)
def test_shapes_count_by_their_weights_on_every_clock(clock: Clock) -> None:
    weighted = OverSamples([(Scripted(1.0), 0.75), (Scripted(3.0), 0.25)])
    found = in_turns([Scripted(1.0), weighted], Until(3, 60.0), clock)
    assert found.timings[1].median_ms == pytest.approx(1500)


def test_ratios_are_paired_within_rounds():
    drift = [1.0 + 0.5 * np.sin(i / 2) for i in range(500)]  # hits both alike, as a busy machine does
    slow, fast = Scripted(*drift), Scripted(*(value / 2 for value in drift))
    # Equal numbers of warm-up runs keep the two scripts in step.
    result = in_turns([slow, fast], Until(rounds=30, budget_s=0.0))
    assert result.rounds == 30
    assert result.ratios == pytest.approx((1.0, 2.0))
    assert not result.disturbed


def test_scattering_ratios_are_flagged():
    rng = np.random.default_rng(0)
    noisy = Scripted(*rng.uniform(1, 3, 400))
    assert in_turns([Scripted(1.0), noisy], Until(rounds=30, budget_s=0.0)).disturbed


def test_rounds_turn_around():
    order: list[int] = []
    runs = list(range(3))

    def note(run: int) -> float:
        order.append(run)
        return float(run)

    assert one_round(runs, note) == [0.0, 1.0, 2.0]
    assert one_round(runs, note, backward=True) == [0.0, 1.0, 2.0]
    assert order == [0, 1, 2, 2, 1, 0]


def test_clock_of_one_cpu_thread_ignores_other_processes():
    assert steady_clock(ONE) is Clock.CPU
    assert steady_clock(Target(threads=2)) is Clock.WALL
    assert steady_clock(Target("cuda", threads=1)) is Clock.WALL


def test_a_clock_that_ticks_as_coarsely_as_that_of_windows_is_not_read(monkeypatch: pytest.MonkeyPatch):
    readings = iter([0.0, 0.0, 0.0, 0.0156, 0.0156, 0.0156, 0.0468])
    assert tick_s(lambda: next(readings), 2) == pytest.approx(0.0156)
    assert tick_s(time.thread_time) < 1e-5
    monkeypatch.setattr("time.thread_time", lambda: time.perf_counter() // 0.0156 * 0.0156)
    thread_clock.cache_clear()
    try:
        assert (clock_for("cpu", 1), steady_clock(ONE)) == (Clock.WALL, Clock.WALL)
    finally:
        thread_clock.cache_clear()


def test_what_is_shown_side_by_side_is_read_on_one_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(conv_model((1, 3, 8, 8), (4, 3, 3, 3)), path)
    assert common_clock([path], [ONE, ONE]) is Clock.CPU
    assert common_clock([path], [ONE, Target(threads=2)]) is Clock.WALL
    feeds = {"x": np.ones((1, 3, 8, 8), np.float32)}
    assert race([(path, "all")], ONE, [(feeds, 1.0)], 0.1, clock=Clock.WALL).clock is Clock.WALL
    monkeypatch.setattr("onnx_lowrank.latency.race.LARGE_BYTES", 0)
    assert common_clock([path], [ONE]) is Clock.WALL


def test_measurements_are_joined_round_by_round():
    parts = [in_turns([Scripted(before), Scripted(1.0)], Until(rounds=3, budget_s=0.0)) for before in (2.0, 3.0, 2.5)]
    whole = joined([replace(parts[0], disturbed=True, disturbed_rounds=1.0), *parts[1:]])
    assert whole.rounds == sum(part.rounds for part in parts)
    assert whole.timings[0].samples_ms == tuple(ms for part in parts for ms in part.timings[0].samples_ms)
    assert len(whole.timings[1].runs_ms) == sum(len(part.timings[1].runs_ms) for part in parts)
    assert whole.ratios == (1.0, 2.5)
    low, high = whole.ci95[1]
    assert low <= 2 < 3 <= high
    assert whole.disturbed
    assert whole.disturbed_rounds == pytest.approx(1 / 3)
    assert joined(parts[:1]).ratios == parts[0].ratios


def test_a_noisy_part_that_went_on_for_longer_counts_no_more_than_the_others():
    times = {2.24: 5, 2.4: 60, 2.26: 5}
    parts = [in_turns([Scripted(t), Scripted(1.0)], Until(rounds, budget_s=0.0)) for t, rounds in times.items()]
    whole = joined(parts)
    assert whole.rounds == 15
    assert whole.ratios[1] == pytest.approx(2.26)


def test_what_has_to_hold_elsewhere_is_timed_by_several_processes(tmp_path: Path):
    path = tmp_path / "m.onnx"
    onnx.save(conv_model((1, 3, 8, 8), (4, 3, 3, 3)), path)
    samples = [({"x": np.ones((1, 3, 8, 8), np.float32)}, 1.0)]
    race([(path, "all")], ONE, samples, 0.1)
    first = shared().pid
    found = race_repeatedly([(path, "all")] * 2, ONE, samples, 0.3)
    assert shared().pid != first
    assert found.rounds >= SITTINGS * SITTING_ROUNDS
    assert len(found.ratios) == 2
