"""The fastest model whose measured error is within a limit."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from onnx_lowrank.candidates import Candidate, loss_of
from onnx_lowrank.goals import Goal
from onnx_lowrank.search.attempt import Attempt, Outcome, same
from onnx_lowrank.search.trail import Trail
from onnx_lowrank.search.workshop import Workshop

logger = logging.getLogger(__name__)
ERROR_PROBES = 7
ALLOCATIONS = 12
# Choose by this share of an error limit: the samples it is reported on are others.
ERROR_AIM = 0.9


@dataclass(frozen=True, eq=False)
class ErrorSearch(Workshop):
    """A search along the predicted loss, every model refitted and its error measured."""

    def _faithful_enough(self, goal: Goal) -> Outcome:
        """The fastest model whose measured error is within the limit, looked for along the predicted loss."""
        limit, best = ERROR_AIM * goal.value, self._attempt(self._keep_all(), self.prediction)
        found, trail = list[Attempt](), Trail(limit)
        for _ in range(ERROR_PROBES):
            chosen = self._within(trail.loss)
            if (found and self.bench.late) or any(same(chosen, old.chosen) for old in found):
                break
            attempt = self._attempt(chosen, self.prediction, finished=True)
            found.append(replace(attempt, error=self.error_of(attempt.path)))
            error = found[-1].error or 0.0
            logger.info("at predicted loss %.3g: error %.4g", attempt.loss, error)
            exact = any(candidate.exact for candidate in chosen)  # full rank: slower, and meant to be
            if error <= limit and (exact or attempt.predicted_ms < best.predicted_ms):
                best = found[-1]
            if not trail.learn(attempt.loss, error):
                break
        if not any(candidate.chain for candidate in best.chosen):
            return self._kept("no rewrite stays within the limit: every layer is kept", reached=True)
        best = self._corrected(best, [attempt.chosen for attempt in found])
        within = f"{best.error:.4g} where it was searched for, the limit being {goal.value:g}"
        return self._finished(best, limit, within, check=any(candidate.exact for candidate in best.chosen))

    def _corrected(self, attempt: Attempt, others: Sequence[Sequence[Candidate]]) -> Attempt:
        """The attempt with a prediction corrected by the choice that is most like its own."""
        rest = [chosen for chosen in others if not same(chosen, attempt.chosen)]
        if not rest:
            return attempt
        near = min(rest, key=lambda chosen: abs(self.prediction.ms(chosen) - attempt.predicted_ms))
        ms = self._informed(attempt.chosen, near).ms(attempt.chosen)
        return replace(attempt, predicted_ms=ms, predicted_share=ms / self.prediction.normalized_ms)

    def _finished(self, best: Attempt, limit: float, within: str, *, check: bool) -> Outcome:
        """The model found for an error goal, timed; `check`: it is at full rank, slower, and meant to be."""
        best = self.timed(best)
        if not check and best.race is not None and best.race.ratio(1, 2).high < 1:
            reason = f"what stays within the limit is slower ({best.race.ratio(1, 2)}): every layer is kept"
            return self._kept(reason, reached=True)
        if check:
            return Outcome(best, reached=True, reason=within)
        best, back = self._guarded(best, lambda other: (other.error or 0.0) <= limit)
        return Outcome(best, reached=True, reason=within, put_back=back)

    def _within(self, loss: float) -> tuple[Candidate, ...]:
        """The fastest choice whose predicted loss is at most `loss`: bisection on the latency allowed."""
        slow, fast = self.prediction.normalized_ms, self.prediction.fastest_ms()
        best = tuple(self.allocator(self.prediction.problem(slow)))
        quickest = tuple(self.allocator(self.prediction.problem(fast)))
        if loss_of(quickest) <= loss:
            return quickest
        for _ in range(ALLOCATIONS):
            middle = (slow + fast) / 2
            chosen = tuple(self.allocator(self.prediction.problem(middle)))
            if loss_of(chosen) <= loss:
                slow, best = middle, chosen
            else:
                fast = middle
        return best
