"""The search for a device that is not here: the first allocation is the answer, predicted and called so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnx_lowrank.candidates import Candidate
from onnx_lowrank.goals import Goal
from onnx_lowrank.plan import ESTIMATED
from onnx_lowrank.search.attempt import Attempt, Outcome
from onnx_lowrank.search.loop import AIM, Loop
from onnx_lowrank.search.prediction import Prediction


@dataclass(frozen=True, eq=False, kw_only=True)
class Foresight(Loop):
    """A search that times nothing.

    Args:
        planned_for: The device, in words.
        source: Whether its latencies were "measured" there or are "estimated".
    """

    planned_for: str
    source: str

    def _fast_enough(self, goal: Goal) -> Outcome:
        wanted = self._wanted(goal, self.baseline)
        chosen = self.allocator(self.prediction.problem(wanted / AIM))
        attempt = self._attempt(chosen, self.prediction)
        # Aimed at a little more than the goal; what is just below the aim still reaches it.
        return self._foretold(attempt, "", reached=attempt.predicted_ms <= wanted)

    def _informed(self, chosen: Sequence[Candidate], near: Sequence[Candidate]) -> Prediction:
        del chosen, near  # no neighbour can be timed
        return self.prediction

    def _finished(self, best: Attempt, limit: float, within: str, *, check: bool) -> Outcome:
        del limit, check
        return self._foretold(best, f"{within}; ", reached=True)

    def _foretold(self, attempt: Attempt, found: str, *, reached: bool) -> Outcome:
        before, ms = self.baseline.timings[0].median_ms, attempt.predicted_ms
        # The goal of one that keeps all layers may still be out of reach: the same sentence says how far.
        how = "estimated" if self.source == ESTIMATED else "predicted, not measured"
        speed = f"{ms:.3g} ms {how}, {before / ms:.3f}x as fast as the original"
        return Outcome(attempt, reached, f"{found}{speed}, on {self.planned_for}")
