"""The clock: medians with bootstrap intervals, and models compared in turns so that a disturbance hits all of them.

A machine is never quiet. Models are therefore run A B C, C B A, A B C, ... and only the ratios within a round are
compared; an interval comes from resampling rounds. On one CPU thread `Clock.CPU` counts the time the thread really
ran: equal to the wall clock on an idle machine, and untouched by other processes on a busy one.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.runtime import Session
from onnx_lowrank.signature import Feeds
from onnx_lowrank.target import Target

Interval = tuple[float, float]
R = TypeVar("R")
_RESAMPLES = 1000
_WIDTH = 0.015  # half width of the interval of a ratio at which more rounds are of no use
_WARM_UP_RUNS = 10


class Run(Protocol):
    """Something that can be run again and again, such as a bound session."""

    def seconds(self) -> float:
        """Run once; wall clock."""
        ...


class Clock(enum.Enum):
    """What a second is: on the wall, or of this thread on the processor (single-threaded sessions on the CPU only)."""

    WALL = "wall"
    CPU = "cpu"


@dataclass(frozen=True)
class Timing:
    """Latency of one model; the interval is of the median, 95 %."""

    median_ms: float
    ci95_ms: Interval
    samples_ms: tuple[float, ...]


@dataclass(frozen=True)
class Ratio:
    """How many times as fast one model is as another: median over the rounds, 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f}x ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Paired:
    """Several models timed in turns.

    Args:
        timings: One per model, in the order given.
        ratios: Median over the rounds of (first model / this model): above 1 is faster than the first. First entry: 1.
        ci95: Bootstrap interval of each ratio.
        rounds: Times every model was run.
        clock: What was read.
        disturbed: The machine was too busy to trust the ratios: they drift, scatter, or stay wide.
    """

    timings: tuple[Timing, ...]
    ratios: tuple[float, ...]
    ci95: tuple[Interval, ...]
    rounds: int
    clock: Clock
    disturbed: bool

    def ratio(self, slow: int, fast: int) -> Ratio:
        """Time of model `slow` over that of model `fast`, within the rounds."""
        ratios = np.array(self.timings[slow].samples_ms) / np.array(self.timings[fast].samples_ms)
        return Ratio(float(np.median(ratios)), *bootstrap_median(ratios))


def steady_clock(target: Target) -> Clock:
    """The clock that other processes disturb least."""
    return Clock.CPU if target.in_calling_thread else Clock.WALL


def paired(
    sessions: Sequence[Session],
    feeds_list: Sequence[Feeds],
    rounds: int = 9,
    budget_s: float = 20.0,
    clock: Clock = Clock.WALL,
) -> Paired:
    """Time models in turns until every ratio is known to 1.5 % or the budget is spent.

    Args:
        sessions: The first is the one the others are compared with.
        feeds_list: One sample per session.
        rounds: At least so many, whatever the budget.
        budget_s: Wall clock, warm-up included.
        clock: See `Clock`.
    """
    bound = [session.bind(feeds) for session, feeds in zip(sessions, feeds_list, strict=True)]
    return in_turns(bound, rounds, budget_s, clock)


def in_turns(runs: Sequence[Run], rounds: int, budget_s: float, clock: Clock = Clock.WALL) -> Paired:
    """`paired` for anything that can be run; the first is the one the others are compared with."""
    deadline = time.perf_counter() + budget_s
    warm_up(runs, budget_s / 8)
    samples: list[list[float]] = []
    while len(samples) < rounds or (time.perf_counter() < deadline and not _settled(samples)):
        samples.append(one_round(runs, lambda run: seconds(run, clock), backward=len(samples) % 2 == 1))
    table = np.array(samples)
    ratios = table[:, :1] / table
    intervals = tuple(bootstrap_median(column) for column in ratios.T)
    medians = tuple(float(value) for value in np.median(ratios, axis=0))
    return Paired(
        timings=tuple(_timing(column) for column in table.T),
        ratios=medians,
        ci95=intervals,
        rounds=len(samples),
        clock=clock,
        disturbed=any(_is_disturbed(column) for column in ratios.T[1:]),
    )


def one_round(runs: Sequence[R], measure: Callable[[R], float], *, backward: bool = False) -> list[float]:
    """One measurement of each, in order or backwards so that no run always follows the same neighbour."""
    order = range(len(runs))
    taken = {index: measure(runs[index]) for index in (reversed(order) if backward else order)}
    return [taken[index] for index in order]


def seconds(run: Run, clock: Clock) -> float:
    """One run on the given clock."""
    if clock is Clock.WALL:
        return run.seconds()
    start = time.thread_time()
    run.seconds()
    return time.thread_time() - start


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


def bootstrap_median(samples: NDArray[np.float64]) -> Interval:
    """95 % percentile bootstrap interval of the median; the resampling is seeded."""
    generator = np.random.default_rng(0)
    drawn = generator.choice(samples, size=(_RESAMPLES, len(samples)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return float(low), float(high)


def _timing(samples_s: NDArray[np.float64]) -> Timing:
    in_ms = samples_s * 1e3
    return Timing(float(np.median(in_ms)), bootstrap_median(in_ms), tuple(float(value) for value in in_ms))


def _settled(samples: list[list[float]]) -> bool:
    if len(samples) % 4:  # resampling after every round would cost more than a small model
        return False
    table = np.array(samples)
    return all(_half_width(column) <= _WIDTH for column in (table[:, :1] / table)[:, 1:].T)


def _half_width(ratios: NDArray[np.float64]) -> float:
    low, high = bootstrap_median(ratios)
    return (high - low) / 2 / float(np.median(ratios))


def _is_disturbed(ratios: NDArray[np.float64]) -> bool:
    third = max(1, len(ratios) // 3)
    low, median, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    drift = abs(float(np.median(ratios[:third]) / np.median(ratios[-third:])) - 1)
    return drift > 0.05 or float((high - low) / median) > 0.2 or _half_width(ratios) > 2 * _WIDTH
