"""Model files run against each other in turns, over several inputs, in a bounded amount of memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onnx_lowrank.latency.measure import Paired, Run, in_turns
from onnx_lowrank.runtime import open_session
from onnx_lowrank.signature import Feeds
from onnx_lowrank.target import Target

Weighted = tuple[Feeds, float]
# Above this a session is opened for each turn anew: two or three of them at once would not fit into memory.
LARGE_BYTES = 1 << 30
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


def race(entries: Sequence[tuple[Path, str]], target: Target, samples: Sequence[Weighted], budget_s: float) -> Paired:
    """Time model files in turns.

    Args:
        entries: File and optimization level of each; the first is the one the others are compared with.
        target: Where to run.
        samples: Inputs, and how much each counts.
        budget_s: Wall clock, opening excluded.

    Raises:
        InputError, ProviderError: if a model does not open or run.
    """
    if sum(_bytes(path) for path, _ in entries) > LARGE_BYTES:
        lazy = [OpenedEachTime(path, level, target, samples) for path, level in entries]
        return in_turns(lazy, LARGE_ROUNDS, budget_s)
    sessions = [open_session(path, target, level) for path, level in entries]
    runs = [OverSamples([(session.bind(feeds), weight) for feeds, weight in samples]) for session in sessions]
    return in_turns(runs, ROUNDS, budget_s)


def _bytes(path: Path) -> int:
    return sum(part.stat().st_size for part in (path, path.with_name(path.name + ".data")) if part.exists())
