"""Models compared in turns, so that a disturbance hits all of them, until their ratios are known.

A machine is never quiet. Models are therefore run A B C, C B A, A B C, ... and only the ratios within a round are
compared; `estimate` gives their intervals. Around every round a `Witness` looks for other work on the machine: rounds
it saw disturbed are repeated, and where that does not help they are used and said to be so. On one CPU thread
`Clock.CPU` counts the time the thread really ran: equal to the wall clock on an idle machine, and untouched by other
processes on a busy one. How long a caller waited for each single run is kept beside it, on the wall clock.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.latency.estimate import Interval, Ratio, median_interval, ratio_of
from onnx_lowrank.latency.turns import Clock, Run, one_round, runs_per_sample, thread_clock, warm_up
from onnx_lowrank.target import Target

Round = Sequence[Sequence[float]]  # of every model, the seconds of its runs; none where it rested
# A measurement of which more than this share of the rounds was disturbed is called so.
DISTURBED_SHARE = 0.25


class Witness(Protocol):
    """Sees what else the machine does; see `interference`."""

    def begin(self) -> None:
        """A round starts now."""
        ...

    def disturbed(self) -> bool:
        """Whether something disturbed the round that ends now."""
        ...


@dataclass(frozen=True)
class Until:
    """When enough was measured.

    Args:
        rounds: At least so many.
        budget_s: Wall clock after which no round beyond these is begun; an eighth of it may go into warming up.
        half_width: Of the 95 % interval of a ratio, as a share of it, at which it is known.
        most: Rounds at most, those repeated because they were disturbed included; None: what the budget allows.
        sample_s: A sample of a shorter run is the mean of several, one behind the other.
        enough: Ratios that are known end it after so many runs of each only: percentiles far out need many.
        resting: A model whose ratio is known is run no more while others are not; then only ratios to the first count.
    """

    rounds: int = 9
    budget_s: float = 20.0
    half_width: float = 0.015
    most: int | None = None
    sample_s: float = 0.0
    enough: int = 0
    resting: bool = False


@dataclass(frozen=True)
class Timing:
    """Latency of one model; the interval is of the median of its samples, 95 %.

    Args:
        median_ms: Of the samples.
        ci95_ms: Interval of it.
        samples_ms: One per round, each the mean of one or more runs; NaN in rounds it rested in.
        runs_ms: Every single run of all rounds, disturbed ones too, on the wall clock: what a caller waits for, now and
            then far longer than the median tells. Empty for a `Run` that does not read the clock it is given.
    """

    median_ms: float
    ci95_ms: Interval
    samples_ms: tuple[float, ...]
    runs_ms: tuple[float, ...] = ()


@dataclass(frozen=True)
class Paired:
    """Several models timed in turns.

    Args:
        timings: One per model, in the order given.
        ratios: Median over the rounds of (first model / this model): above 1 is faster than the first. First entry: 1.
        ci95: Interval of each ratio.
        rounds: Rounds these figures are taken from.
        clock: What was read.
        disturbed: The machine was too busy to trust the ratios: they drift, scatter or stay wide, or other work was
            seen in more than a quarter of the rounds.
        disturbed_rounds: Share of all rounds, repeated ones included, that other work was seen in.
        cores: Processor cores the measuring process was pinned to; empty where that cannot be done.
        seen: All rounds, disturbed ones included.
    """

    timings: tuple[Timing, ...]
    ratios: tuple[float, ...]
    ci95: tuple[Interval, ...]
    rounds: int
    clock: Clock
    disturbed: bool
    disturbed_rounds: float = 0.0
    cores: tuple[int, ...] = ()
    seen: int = 0

    def ratio(self, slow: int, fast: int) -> Ratio:
        """Time of model `slow` over that of model `fast`, within the rounds."""
        return ratio_of(np.array(self.timings[slow].samples_ms) / np.array(self.timings[fast].samples_ms))

    def on(self, cores: tuple[int, ...]) -> Paired:
        """The same, measured on these cores."""
        return replace(self, cores=cores)


class _Stopwatch:
    """The clock of a measurement, and the wall clock read beside it."""

    def __init__(self, clock: Clock) -> None:
        self._now, self._read = clock.now, list[float]()

    def __call__(self) -> float:
        self._read.append(time.perf_counter())
        return self._now()

    def waited(self) -> list[float]:
        """Seconds on the wall of every run since the last call; a run reads the clock before and after itself."""
        read, self._read = self._read, []
        return [end - start for start, end in zip(read[::2], read[1::2], strict=True)]


class _Quiet:
    """A witness who sees nothing."""

    def begin(self) -> None: ...

    def disturbed(self) -> bool:
        return False


def steady_clock(target: Target) -> Clock:
    """The clock that other processes disturb least."""
    return thread_clock() if target.in_calling_thread else Clock.WALL


def in_turns(runs: Sequence[Run], until: Until, clock: Clock = Clock.WALL, witness: Witness | None = None) -> Paired:
    """Time everything in turns until every ratio to the first is known or the budget is spent.

    Args:
        runs: The first is the one the others are compared with.
        until: When to stop.
        clock: See `Clock`.
        witness: Looks for other work on the machine.
    """
    witness = witness or _Quiet()
    deadline = time.perf_counter() + until.budget_s
    warm_up(runs, until.budget_s / 8)
    repeats = [_repeats(run, clock, until.sample_s) for run in runs]
    rounds: list[Round] = []
    seen: list[bool] = []
    resting: set[int] = set()
    watch = _Stopwatch(clock)
    waited: list[list[float]] = [[] for _ in runs]

    def sample(index: int) -> list[float]:
        taken = [] if index in resting else [runs[index].seconds(watch) for _ in range(repeats[index])]
        waited[index] += watch.waited()
        return taken

    while True:
        witness.begin()
        rounds.append(one_round(range(len(runs)), sample, backward=len(rounds) % 2 == 1))
        seen.append(witness.disturbed())
        if len(rounds) < until.rounds:
            continue
        table = _means(_trusted(rounds, seen, until.rounds))
        known = {index for index in range(1, len(runs)) if _is_known(table, index, until)}
        quiet = len(rounds) - sum(seen)
        # On a machine that is hardly ever quiet there is nothing to wait for.
        settled = len(known) == len(runs) - 1 and len(rounds) * min(repeats) >= until.enough
        if settled and (quiet >= until.rounds or quiet < DISTURBED_SHARE * len(rounds)):
            break
        if time.perf_counter() >= deadline or len(rounds) == until.most:
            break
        resting = known if until.resting and len(known) < len(runs) - 1 else set()
    return _paired(_trusted(rounds, seen, until.rounds), waited, clock, seen)


def joined(parts: Sequence[Paired]) -> Paired:
    """The same models timed several times over, as one measurement in which every part counts alike.

    Parts that went on for longer, as they were noisier, are thinned to the rounds of the shortest.
    """
    fewest = min(part.rounds for part in parts)
    tables = [np.array([timing.samples_ms for timing in part.timings]).T for part in parts]
    table = np.vstack([table[np.linspace(0, len(table) - 1, fewest).round().astype(int)] for table in tables])
    ratios = (table[:, :1] / table).T
    found = [ratio_of(column) for column in ratios]
    runs = [[run for part in parts for run in part.timings[model].runs_ms] for model in range(table.shape[1])]
    seen = sum(part.seen for part in parts)
    lost = sum(part.seen * part.disturbed_rounds for part in parts) / seen
    return Paired(
        timings=tuple(
            _timing(samples, [run / 1e3 for run in single]) for samples, single in zip(table.T / 1e3, runs, strict=True)
        ),
        ratios=tuple(ratio.value for ratio in found),
        ci95=tuple((ratio.low, ratio.high) for ratio in found),
        rounds=len(table),
        clock=parts[0].clock,
        disturbed=any(map(_scatters, ratios[1:])) or lost > DISTURBED_SHARE,
        disturbed_rounds=lost,
        cores=tuple(sorted({core for part in parts for core in part.cores})),
        seen=seen,
    )


def _repeats(run: Run, clock: Clock, sample_s: float) -> int:
    return 1 if sample_s == 0 else runs_per_sample(run.seconds(clock.now), sample_s)


def _trusted(rounds: Sequence[Round], seen: Sequence[bool], fewest: int) -> Sequence[Round]:
    """The rounds that nothing disturbed; all where those are too few for one of the models, which may have rested."""
    quiet = [one for one, disturbed in zip(rounds, seen, strict=True) if not disturbed]
    taken = [sum(map(bool, column)) for column in zip(*quiet, strict=True)]
    return quiet if min(taken, default=0) >= fewest else rounds


def _means(rounds: Sequence[Round]) -> NDArray[np.float64]:
    """Rounds x models; NaN where a model rested."""
    return np.array([[math.fsum(runs) / len(runs) if runs else math.nan for runs in one] for one in rounds])


def _is_known(table: NDArray[np.float64], index: int, until: Until) -> bool:
    ratios = table[:, 0] / table[:, index]
    taken = np.count_nonzero(~np.isnan(ratios))
    return bool(taken >= until.rounds) and ratio_of(ratios).half_width <= until.half_width


def _paired(rounds: Sequence[Round], waited: Sequence[Sequence[float]], clock: Clock, seen: Sequence[bool]) -> Paired:
    table, disturbed_rounds = _means(rounds), sum(seen) / len(seen)
    ratios = table[:, :1] / table
    found = [ratio_of(column) for column in ratios.T]
    busy = any(_is_unsteady(column[~np.isnan(column)]) for column in ratios.T[1:])
    return Paired(
        timings=tuple(map(_timing, table.T, waited)),
        ratios=tuple(ratio.value for ratio in found),
        ci95=tuple((ratio.low, ratio.high) for ratio in found),
        rounds=len(table),
        clock=clock,
        disturbed=busy or disturbed_rounds > DISTURBED_SHARE,
        disturbed_rounds=disturbed_rounds,
        seen=len(seen),
    )


def _timing(samples_s: NDArray[np.float64], runs_s: Sequence[float]) -> Timing:
    in_ms = samples_s * 1e3
    taken = in_ms[~np.isnan(in_ms)]
    single = tuple(1e3 * seconds for seconds in runs_s)
    return Timing(float(np.median(taken)), median_interval(taken), tuple(float(value) for value in in_ms), single)


def _is_unsteady(ratios: NDArray[np.float64]) -> bool:
    third = max(1, len(ratios) // 3)
    drift = abs(float(np.median(ratios[:third]) / np.median(ratios[-third:])) - 1)
    return drift > 0.05 or _scatters(ratios)


def _scatters(ratios: NDArray[np.float64]) -> bool:
    low, median, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    return float((high - low) / median) > 0.2 or ratio_of(ratios).half_width > 0.03
