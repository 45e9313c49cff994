"""What the search holds on to: a choice made real and what was measured of it, and the outcome."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onnx_lowrank.candidates import Candidate
from onnx_lowrank.latency.measure import Paired
from onnx_lowrank.pass_manager import PassRecord
from onnx_lowrank.plan import Plan
from onnx_lowrank.search.prediction import Prediction


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
    return [(c.key, c.method, c.rank) for c in a] == [(c.key, c.method, c.rank) for c in b]


def scaled_ms(attempt: Attempt, prediction: Prediction) -> float:
    """Measured latency on the scale of the prediction: the machine's speed drifts, ratios hold."""
    assert attempt.race is not None  # noqa: S101 - only timed attempts come here
    return prediction.normalized_ms / attempt.race.ratio(1, 2).value


def loss_of(chosen: Sequence[Candidate]) -> float:
    """Predicted damage of a choice."""
    return sum(candidate.loss for candidate in chosen)
