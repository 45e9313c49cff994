"""What the search holds on to: a choice made real and what was measured of it, and the outcome."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onnx_lowrank.candidates import Candidate, loss_of
from onnx_lowrank.goals import Goal, Speedup
from onnx_lowrank.latency.measure import Paired
from onnx_lowrank.pass_manager import PassRecord
from onnx_lowrank.plan import Plan
from onnx_lowrank.search.prediction import Prediction

# A speed goal counts as reached when the lower 95 % bound is at least this share of it.
GOAL_SHARE = 0.98
# The search goes on until the bound is at least this share: the finished model is timed once more, and noise remains.
SAFE_SHARE = 1.0


@dataclass(frozen=True, eq=False)
class Attempt:
    """A finished model and what was found out about it.

    Args:
        chosen: One candidate per factorable layer.
        plan: The same, to be written down.
        path: The file.
        record: What the factor pass did.
        predicted_ms: Fixed before this model was first timed.
        predicted_share: The same as a share of the normalized model's latency: the machine's speed drifts.
        level: Optimization level it was timed at.
        race: Original, normalized and this model in turns; None where time does not decide.
        error: Relative error of the outputs where the goal limits it.
    """

    chosen: tuple[Candidate, ...]
    plan: Plan
    path: Path
    record: PassRecord
    predicted_ms: float
    predicted_share: float
    level: str = "all"
    race: Paired | None = None
    error: float | None = None

    @property
    def loss(self) -> float:
        """Predicted damage."""
        return loss_of(self.chosen)

    @property
    def timed(self) -> Paired:
        """The race of an attempt that is known to have been timed."""
        assert self.race is not None  # noqa: S101 - only timed attempts come here
        return self.race


@dataclass(frozen=True, eq=False)
class Outcome:
    """The best attempt, whether it reached the goal, and why, in words.

    Args:
        best: The attempt.
        reached: Whether it reaches the goal.
        reason: Why, in words.
        put_back: Keys of layers whose chains were taken out again: the finished model is no slower without them.
    """

    best: Attempt
    reached: bool
    reason: str
    put_back: tuple[str, ...] = ()


def same(a: Sequence[Candidate], b: Sequence[Candidate]) -> bool:
    """Whether two choices write the same model."""
    return [c.name for c in a] == [c.name for c in b]


def scaled_ms(attempt: Attempt, prediction: Prediction) -> float:
    """Measured latency on the scale of the prediction: the machine's speed drifts, ratios hold."""
    return prediction.normalized_ms / attempt.timed.ratio(1, 2).value


def standing(goal: Goal, attempt: Attempt) -> tuple[bool, float]:
    """Whether a timed attempt reaches a speed goal, and its lower bound as a multiple of the goal."""
    if isinstance(goal, Speedup):
        share = attempt.timed.ratio(0, 2).low / goal.value
    else:
        share = goal.value / attempt.timed.timings[2].ci95_ms[1]
    return share >= SAFE_SHARE, share


def straddling(goal: Goal, attempts: Sequence[Attempt]) -> tuple[Attempt, Attempt] | None:
    """The model that is least too fast and the one least too slow; None where there are not both."""
    fast = [attempt for attempt in attempts if standing(goal, attempt)[0]]
    slow = [attempt for attempt in attempts if not standing(goal, attempt)[0]]
    if not fast or not slow:
        return None
    return (
        min(fast, key=lambda attempt: standing(goal, attempt)[1]),
        max(slow, key=lambda attempt: standing(goal, attempt)[1]),
    )


def mixed(fast: Attempt, slow: Attempt) -> tuple[Candidate, ...]:
    """The faster choice with half of the layers that differ as in the slower one: where that spares most loss."""
    pairs = list(zip(fast.chosen, slow.chosen, strict=True))
    differing = [index for index, (a, b) in enumerate(pairs) if a.name != b.name]
    differing.sort(key=lambda index: pairs[index][1].loss - pairs[index][0].loss)
    taken = differing[: (len(differing) + 1) // 2]
    return tuple(b if index in taken else a for index, (a, b) in enumerate(pairs))
