"""Other work on the machine is seen and its rounds repeated; enough is measured, and no more, to be near the truth."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from onnx_lowrank.latency.interference import STOLEN, Interference, Moment, _apart, matrix_products, pin
from onnx_lowrank.latency.measure import Until, in_turns
from onnx_lowrank.latency.turns import Clock, Now

Disturbance = Callable[["Shared", int], float]
TRIALS = 200


class Drawn:
    """A run of `level` seconds with lognormal noise."""

    def __init__(self, level: float, noise: float, seed: int) -> None:
        self.level, self.noise, self.runs = level, noise, 0
        self._rng = np.random.default_rng(seed)

    def seconds(self, now: Now = time.perf_counter) -> float:
        self.runs += 1
        return self.level * self._rng.lognormal(0, self.noise)


class Sleeper:
    """A run that waits two milliseconds, and reads the clock before and after."""

    def seconds(self, now: Now = time.perf_counter) -> float:
        start = now()
        time.sleep(0.002)
        return now() - start


class Said:
    """A witness who says what it was told to."""

    def __init__(self, *verdicts: bool) -> None:
        self._verdicts = itertools.cycle(verdicts)

    def begin(self) -> None: ...

    def disturbed(self) -> bool:
        return next(self._verdicts)


def watched(kernel: list[float], clocks: list[tuple[float, float]]) -> Interference:
    """An `Interference` that sees these kernel times, and these seconds on the wall and lost to others."""
    times, moments = iter(kernel), iter(Moment(*pair) for pair in clocks)
    return Interference(lambda: next(times), lambda: next(moments))


def verdicts(witness: Interference, rounds: int) -> Iterator[bool]:
    for _ in range(rounds):
        witness.begin()
        yield witness.disturbed()


def test_a_slow_kernel_disturbs_the_rounds_on_both_sides() -> None:
    clocks = [(float(i), 0.0) for i in range(8)]
    assert list(verdicts(watched([1.0, 1.1, 1.4, 1.0, 1.2], clocks), 4)) == [False, True, True, False]


def test_time_that_went_to_others_disturbs() -> None:
    clocks = [(0.0, 0.0), (1.0, 0.05), (2.0, 1.0), (3.0, 1.5)]
    assert list(verdicts(watched([1.0] * 3, clocks), 2)) == [False, True]


def _busy() -> None:
    while True:
        pass


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="this system does not count waiting threads")
@pytest.mark.parametrize("now", [Moment.of_this_thread, Moment.of_all_threads], ids=lambda now: now.__name__)
def test_a_process_on_the_same_core_takes_its_share(now: Callable[[], Moment]) -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    other = multiprocessing.get_context("spawn").Process(target=_busy, daemon=True)
    try:
        other.start()
        start, deadline = now(), time.monotonic() + 60.0
        while start.stolen_until(now()) < STOLEN:  # it takes a while to start
            assert time.monotonic() < deadline
            if time.monotonic() % 1 < 0.01:
                start = now()
    finally:
        other.kill()
        os.sched_setaffinity(0, allowed)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to cores")
def test_hyperthreads_of_one_core_are_the_last_choice(tmp_path: Path) -> None:
    for core, siblings in {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}.items():
        folder = tmp_path / f"cpu{core}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{siblings}\n")
    assert _apart([2, 0, 3, 1], tmp_path) == [2, 3, 0, 1]
    assert _apart([5, 4], tmp_path) == [5, 4]  # the system does not tell


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to cores")
def test_of_many_cores_no_two_hyperthreads_are_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for core in range(64):
        (tmp_path / f"cpu{core}/topology").mkdir(parents=True)
        (tmp_path / f"cpu{core}/topology/thread_siblings_list").write_text(f"{core // 2 * 2}-{core // 2 * 2 + 1}")
    bound: list[set[int]] = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: bound.append(set(cores)))  # this machine has fewer
    chosen = pin(16, lambda: 0.0, set(range(64)), tmp_path)
    assert len({core // 2 for core in chosen}) == len(chosen) == 16
    assert bound[-1] == set(chosen)


def test_the_real_kernel_takes_about_a_millisecond_of_this_thread() -> None:
    kernel = matrix_products()
    assert 1e-5 < min(kernel() for _ in range(5)) < 0.1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to cores")
def test_pinned_to_the_cores_that_are_allowed() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        assert pin(1, lambda: 0.0, {max(allowed)}) == (max(allowed),)
        assert os.sched_getaffinity(0) == {max(allowed)}
    finally:
        os.sched_setaffinity(0, allowed)


def test_quiet_ratios_are_known_after_the_fewest_rounds_and_noisy_ones_later() -> None:
    quiet = in_turns([Drawn(1, 0.002, 0), Drawn(0.5, 0.002, 1)], Until(9, 60.0))
    noisy = in_turns([Drawn(1, 0.05, 0), Drawn(0.5, 0.05, 1)], Until(9, 60.0))
    assert quiet.rounds == 9
    assert 40 < noisy.rounds < 1000
    for found in (quiet, noisy):
        assert found.ratio(0, 1).half_width <= 0.015
        assert found.ratios[1] == pytest.approx(2, rel=0.02)


def test_what_is_known_rests_while_the_rest_goes_on() -> None:
    first, steady, noisy = Drawn(1, 0.001, 0), Drawn(0.5, 0.001, 1), Drawn(2, 0.04, 2)
    found = in_turns([first, steady, noisy], Until(9, 60.0, most=60, resting=True))
    assert steady.runs < first.runs
    assert found.ratios == pytest.approx((1, 2, 0.5), rel=0.02)
    assert np.isnan(found.timings[1].samples_ms).any()
    assert found.ratio(0, 1).value == found.ratios[1]


def test_rounds_stop_at_the_most() -> None:
    assert in_turns([Drawn(1, 0.3, 0), Drawn(1, 0.3, 1)], Until(9, 60.0, most=21)).rounds == 21


def test_disturbed_rounds_are_left_out() -> None:
    class Disturbed:
        """Three times as slow in the rounds the witness calls disturbed; the first two runs warm up."""

        runs = 0

        def seconds(self, now: Now = time.perf_counter) -> float:
            self.runs += 1
            return 3.0 if self.runs > 2 and (self.runs - 3) % 2 else 1.0

    found = in_turns([Drawn(1, 0.001, 0), Disturbed()], Until(9, 60.0), witness=Said(False, True))
    assert found.rounds == 9
    assert found.ratios[1] == pytest.approx(1, rel=0.01)
    assert found.disturbed


def test_single_runs_of_disturbed_rounds_are_kept() -> None:
    found = in_turns([Sleeper(), Sleeper()], Until(5, 60.0, half_width=9.0), witness=Said(False, True))
    assert found.rounds == 5
    assert [len(timing.runs_ms) for timing in found.timings] == [9, 9]


def test_single_runs_are_as_long_as_the_caller_waits_whatever_the_clock() -> None:
    for clock in Clock:
        found = in_turns([Sleeper()], Until(5, 60.0, sample_s=0.004), clock)
        (timing,) = found.timings
        assert len(timing.runs_ms) >= (2 * found.rounds if clock is Clock.CPU else found.rounds)
        assert min(timing.runs_ms) >= 2
        assert (timing.median_ms < 2) is (clock is Clock.CPU)


def test_what_rested_in_the_quiet_rounds_keeps_its_disturbed_ones() -> None:
    runs = [Drawn(1, 0.001, 0), Drawn(1, 0.001, 1), Drawn(1, 0.3, 2)]
    until = Until(9, 60.0, half_width=0.02, most=21, resting=True)
    found = in_turns(runs, until, witness=Said(*[True] * 12, *[False] * 9))
    assert np.isfinite(found.ratios).all()
    assert found.disturbed


def test_a_machine_that_is_never_quiet_is_called_disturbed() -> None:
    found = in_turns([Drawn(1, 0.001, 0), Drawn(1, 0.001, 1)], Until(9, 60.0, most=21), witness=Said(True))
    assert found.rounds == 9  # nothing to wait for
    assert found.disturbed
    assert found.disturbed_rounds == 1.0


def test_one_disturbed_round_in_five_is_repeated_and_not_called_so() -> None:
    found = in_turns([Drawn(1, 0.001, 0), Drawn(1, 0.001, 1)], Until(8, 60.0), witness=Said(*[False] * 4, True))
    assert found.rounds == 8
    assert found.disturbed_rounds == pytest.approx(0.2, abs=0.1)
    assert not found.disturbed


class Shared:
    """A machine that all runs share: `disturbance` is how much slower its n-th run is, noise of 1 % comes on top."""

    def __init__(self, disturbance: Disturbance, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.truths = self.rng.uniform(0.5, 3, 2)
        self.phase = self.rng.random()
        self._disturbance, self._runs = disturbance, 0

    def run(self, level: float) -> float:
        self._runs += 1
        return level * self._disturbance(self, self._runs) * self.rng.lognormal(0, 0.01)


class Sharing:
    """A run of `level` seconds on a machine that others run on, too."""

    def __init__(self, machine: Shared, level: float) -> None:
        self._machine, self._level = machine, level

    def seconds(self, now: Now = time.perf_counter) -> float:
        return self._machine.run(self._level)


def quiet(machine: Shared, run: int) -> float:
    return 1.0


def swinging(machine: Shared, run: int) -> float:
    """Slower and faster by 30 %, once around in 60 runs: twenty rounds of three."""
    return 1 + 0.3 * np.sin(2 * np.pi * (run / 60 + machine.phase))


def heating(machine: Shared, run: int) -> float:
    """Slower by 1 % from run to run."""
    return 1.01**run


def bursts(machine: Shared, run: int) -> float:
    """Twice as slow for five runs in thirty."""
    return 2.0 if (run / 30 + machine.phase) % 1 < 1 / 6 else 1.0


def two_speeds(machine: Shared, run: int) -> float:
    """Three runs in ten are slow by 8 %."""
    return 1.08 if machine.rng.random() < 0.3 else 1.0


@pytest.mark.parametrize("disturbance", [quiet, swinging, heating, bursts, two_speeds])
def test_ratios_of_a_disturbed_machine_are_near_the_truth_and_cover_it(disturbance: Disturbance) -> None:
    until = Until(rounds=9, budget_s=600.0, half_width=0.02, most=21, sample_s=0.001, resting=True)  # as of chains
    near = covered = 0
    for seed in range(TRIALS):
        machine = Shared(disturbance, seed)
        found = in_turns([Sharing(machine, level) for level in (1.0, *(1 / machine.truths))], until)
        for truth, ratio, (low, high) in zip(machine.truths, found.ratios[1:], found.ci95[1:], strict=True):
            near += abs(ratio / truth - 1) <= 0.02
            covered += low <= truth <= high
        assert 9 <= found.rounds <= 21
    assert near >= 0.95 * 2 * TRIALS
    assert covered >= 0.9 * 2 * TRIALS
