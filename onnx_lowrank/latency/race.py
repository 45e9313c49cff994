"""Model files run against each other in turns, over several inputs, in a bounded amount of memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onnx_lowrank.graph.size import LARGE_BYTES, file_bytes
from onnx_lowrank.latency.measure import Clock, Paired, Run, in_turns, steady_clock
from onnx_lowrank.runtime import open_session
from onnx_lowrank.signature import Feeds
from onnx_lowrank.target import Target

Weighted = tuple[Feeds, float]
ROUNDS, LARGE_ROUNDS = 9, 5


@dataclass(frozen=True, eq=False)
class OverSamples:
    """One run on every sample, weighted."""

    runs: Sequence[tuple[Run, float]]

    def seconds(self) -> float:
        """Weighted sum over the samples."""
        return sum(weight * run.seconds() for run, weight in self.runs)


@dataclass(frozen=True, eq=False)
class OpenedEachTime:
    """A model too large to stay open beside others: opened, run once to warm up, timed, closed."""

    path: Path
    level: str
    target: Target
    samples: Sequence[Weighted]

    def seconds(self) -> float:
        """Weighted sum over the samples, without opening and warming up."""
        session = open_session(self.path, self.target, self.level)
        return sum(weight * min(session.time(feeds, 3)) for feeds, weight in self.samples)


def race(
    entries: Sequence[tuple[Path, str]], target: Target, samples: Sequence[Weighted], budget_s: float, enough: int = 0
) -> Paired:
    """Time model files in turns.

    Args:
        entries: File and optimization level of each; the first is the one the others are compared with.
        target: Where to run.
        samples: Inputs, and how much each counts.
        budget_s: Wall clock, opening excluded.
        enough: Rounds to go on to although the ratios are known, as far as the budget goes.

    Raises:
        InputError, ProviderError: if a model does not open or run.
    """
    return _race([(path, level, target) for path, level in entries], samples, budget_s, enough)


def race_targets(
    path: Path, level: str, targets: Sequence[Target], samples: Sequence[Weighted], budget_s: float
) -> Paired:
    """Time one model file on several targets of one machine in turns, as `race` does."""
    return _race([(path, level, target) for target in targets], samples, budget_s)


def _race(
    entries: Sequence[tuple[Path, str, Target]], samples: Sequence[Weighted], budget_s: float, enough: int = 0
) -> Paired:
    if sum(file_bytes(path) for path, _, _ in entries) > LARGE_BYTES:
        lazy = [OpenedEachTime(path, level, target, samples) for path, level, target in entries]
        return in_turns(lazy, LARGE_ROUNDS, budget_s, Clock.WALL, enough)
    sessions = [open_session(path, target, level) for path, level, target in entries]
    runs = [OverSamples([(session.bind(feeds), weight) for feeds, weight in samples]) for session in sessions]
    clocks = {steady_clock(target) for _, _, target in entries}
    return in_turns(runs, ROUNDS, budget_s, clocks.pop() if len(clocks) == 1 else Clock.WALL, enough)
