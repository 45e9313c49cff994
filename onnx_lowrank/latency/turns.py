"""Runs in turns, on a clock. Needs numpy alone: `latency request` copies this file into the script that it writes."""

from __future__ import annotations

import enum
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

R = TypeVar("R")
T = TypeVar("T")
_ROUNDS = 7
_WARM_UP_S = 0.05
_WARM_UP_RUNS = 10
_SHORTEST_S = 0.001  # a sample shorter than this is the mean of several runs
_MOST_RUNS = 20
_COARSEST_S = 1e-5  # step of a clock: a hundredth of a sample


Now = Callable[[], float]


class Run(Protocol):
    """Something that can be run again and again, such as a bound session."""

    def seconds(self, now: Now = time.perf_counter) -> float:
        """Run once; on the wall clock, or the one that `now` reads."""
        ...


class Clock(enum.Enum):
    """What a second is: on the wall, or of this thread on the processor (single-threaded CPU sessions only)."""

    WALL = "wall"
    CPU = "cpu"

    @property
    def now(self) -> Now:
        """Reads the clock, in seconds."""
        return time.perf_counter if self is Clock.WALL else time.thread_time


def clock_for(provider: str, threads: int) -> Clock:
    """The clock that other processes disturb least, on what the script times (see Target.in_calling_thread)."""
    return thread_clock() if provider == "cpu" and threads == 1 else Clock.WALL


@functools.cache
def thread_clock() -> Clock:
    """The thread's own clock; the wall clock where that one ticks too coarsely to time anything by, as on Windows."""
    return Clock.CPU if tick_s(time.thread_time) <= _COARSEST_S else Clock.WALL


def tick_s(now: Now, ticks: int = 5) -> float:
    """The smallest step a clock was seen to make, in seconds.

    What `time.get_clock_info` says of Windows's is its unit, 100 ns; it makes steps of 15.6 ms.
    """
    steps: list[float] = []
    for _ in range(ticks):
        start = end = now()
        while end == start:
            end = now()
        steps.append(end - start)
    return min(steps)


def one_round(runs: Sequence[R], measure: Callable[[R], T], *, backward: bool = False) -> list[T]:
    """One measurement of each, in order or backwards so that no run always follows the same neighbour."""
    order = range(len(runs))
    taken = {index: measure(runs[index]) for index in (reversed(order) if backward else order)}
    return [taken[index] for index in order]


def warm_up(runs: Sequence[Run], budget_s: float) -> None:
    """Run everything until its best time stops falling by more than 5 %."""
    for run in runs:
        deadline = time.perf_counter() + budget_s / len(runs)
        best = run.seconds()
        for _ in range(_WARM_UP_RUNS):
            if time.perf_counter() > deadline:
                break
            now = run.seconds()
            if now > 0.95 * best:
                break
            best = now


def sample(runs: Sequence[Run], clock: Clock, rounds: int = _ROUNDS) -> NDArray[np.float64]:
    """Seconds, rounds x runs: all runs in turns, back and forth."""
    warm_up(runs, _WARM_UP_S * len(runs))
    repeats = {id(run): runs_per_sample(run.seconds(clock.now)) for run in runs}

    def mean(run: Run) -> float:
        return sum(run.seconds(clock.now) for _ in range(repeats[id(run)])) / repeats[id(run)]

    return np.array([one_round(runs, mean, backward=number % 2 == 1) for number in range(rounds)])


def relative_to_first(samples: NDArray[np.float64]) -> NDArray[np.float64]:
    """Median over the rounds of every run's time as a multiple of the first one's."""
    return np.median(samples / samples[:, :1], axis=0)


def runs_per_sample(one_run_s: float, shortest_s: float = _SHORTEST_S) -> int:
    """How many runs one sample is the mean of: as many as fill `shortest_s`, within bounds."""
    return min(_MOST_RUNS, max(1, math.ceil(shortest_s / max(one_run_s, 1e-9))))
