"""Closing the loop: allocate, realise, measure, correct the prediction, allocate again; a few rounds at most."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

from onnx_lowrank.candidates import Candidate
from onnx_lowrank.goals import Goal, KeepMacs, KeepParams, LatencyMs, Speedup
from onnx_lowrank.latency.child import MeasuringError
from onnx_lowrank.latency.measure import Paired
from onnx_lowrank.search.attempt import Attempt, Outcome, mixed, same, scaled_ms, standing, straddling
from onnx_lowrank.search.error_search import ErrorSearch
from onnx_lowrank.search.prediction import NEIGHBOUR, Prediction, size_problem

logger = logging.getLogger(__name__)
ROUNDS = 7
# Aim this much beyond a speed goal: a model that lands exactly on it misses by noise half of the time.
AIM = 1.02
# Faster than the goal by more than this is accuracy given away: try again with the corrected prediction.
OVERSHOOT = 1.03


@dataclass(frozen=True, eq=False)
class Loop(ErrorSearch):
    """One search, whatever the goal."""

    def run(self, goal: Goal, of_total: float, factorable: float) -> Outcome:
        """Search for the best model that reaches `goal`.

        Args:
            goal: The goal.
            of_total: For goals of size: what its share is a share of.
            factorable: For goals of size: how much of it the factorable layers hold.
        """
        try:
            match goal:
                case Speedup() | LatencyMs():
                    return self._fast_enough(goal)
                case KeepMacs() | KeepParams():
                    return self._small_enough(goal, of_total, factorable)
                case _:
                    return self._faithful_enough(goal)
        except MeasuringError as error:
            return self._kept(f"the model found was not chosen: {error.reason}", reached=False)

    def nearer(self, goal: Goal, missed: Attempt, low_rank: float, standing_then: float) -> Outcome | None:
        """One model more, after one that reached a goal of speed here and missed it when it was finished.

        Args:
            goal: The goal.
            missed: The model.
            low_rank: How many times as fast as the normalized model it was then.
            standing_then: How much of the goal it reached then, at the slow end of the interval.

        Returns:
            A model predicted to be faster by what was missing; None if there is none, or it does not reach the goal.
        """
        prediction = self.prediction.learned(missed.chosen, self.prediction.normalized_ms / low_rank)
        slow = prediction.ms(missed.chosen)
        chosen = self.allocator(prediction.problem(slow * standing_then / AIM))
        if not prediction.ms(chosen) < slow:
            return None
        attempt = self.timed(self._attempt(chosen, prediction))
        return Outcome(attempt, reached=True, reason="measured") if standing(goal, attempt)[0] else None

    def _fast_enough(self, goal: Goal) -> Outcome:
        prediction, attempts = self.prediction, list[Attempt]()
        wanted = self._wanted(goal, self.baseline)
        for _ in range(ROUNDS):
            chosen = self._halfway(goal, attempts, prediction) or self.allocator(prediction.problem(wanted / AIM))
            if any(same(chosen, old.chosen) for old in attempts):
                break
            try:
                attempt = self.timed(self._attempt(chosen, prediction))
            except MeasuringError as error:
                if not attempts:
                    raise
                logger.warning("one of the models found was not chosen: %s", error.reason)
                break
            attempts.append(attempt)
            measured = scaled_ms(attempt, prediction)
            logger.info("predicted %.3f ms, measured %.3f ms", attempt.predicted_ms, measured)
            wanted = self._wanted(goal, attempt.timed)
            reached, excess = standing(goal, attempt)
            if (reached and excess <= OVERSHOOT) or self.bench.late:
                break
            prediction = prediction.learned(chosen, measured)
        return self._pick(goal, attempts)

    def _halfway(self, goal: Goal, attempts: Sequence[Attempt], prediction: Prediction) -> tuple[Candidate, ...] | None:
        """A choice between the model that is least too fast and the one least too slow; None where there is none.

        Two choices that are predicted to take the same may be 5 % apart; between two measured ones is surer. Layers are
        exchanged where the rule's choice is a sum over layers; any other rule is asked for what takes as long.
        """
        both = straddling(goal, attempts)
        if both is None:
            return None
        if self.additive:
            chosen = mixed(*both)
        else:
            chosen = self.allocator(prediction.problem(sum(prediction.ms(attempt.chosen) for attempt in both) / 2))
        return None if any(same(chosen, old.chosen) for old in attempts) else chosen

    def _wanted(self, goal: Goal, race: Paired) -> float:
        """Latency the model must have, on the scale of the prediction."""
        if isinstance(goal, LatencyMs):
            return goal.value
        # In ratios: the machine may run at another speed now than when the table was priced.
        return self.prediction.normalized_ms * race.ratio(0, 1).value / goal.value

    def _pick(self, goal: Goal, attempts: Sequence[Attempt]) -> Outcome:
        reached = [attempt for attempt in attempts if standing(goal, attempt)[0]]
        if reached:
            best = min(reached, key=self._damage) if len(reached) > 1 else reached[0]
            best, back = self._guarded(best, lambda other: standing(goal, other)[0])
            return Outcome(best, reached=True, reason="measured", put_back=back)
        best = max(attempts, key=lambda attempt: standing(goal, attempt)[1])
        if best.race is not None and best.race.ratio(1, 2).value <= 1:
            reason = f"nothing was faster than keeping every layer (best found: {best.race.ratio(1, 2)})"
            return self._kept(reason, reached=False)
        best, back = self._guarded(best, lambda _: True)
        if standing(goal, best)[0]:
            return Outcome(best, reached=True, reason="measured", put_back=back)
        speed = best.race.ratio(0, 2) if best.race else None
        limit = f"the fastest choice of all layers is predicted at {self.prediction.fastest_ms():.3g} ms"
        return Outcome(
            best, reached=False, reason=f"best found: {speed} as fast as the original; {limit}", put_back=back
        )

    def _damage(self, attempt: Attempt) -> float:
        """Infinite for what ruins the outputs."""
        loss = self.damage(attempt.chosen)
        return loss if math.isfinite(loss) else math.inf

    def _small_enough(self, goal: Goal, of_total: float, factorable: float) -> Outcome:
        """The choice of least loss within a share of MACs or parameters.

        No layer is put back afterwards, however slow its chain: it is there for its size, and the goal would be missed.
        """
        problem = size_problem(self.prediction.rows, goal, of_total, factorable)
        chosen = self.allocator(problem)
        kept = (problem.total(chosen) + of_total - factorable) / of_total if of_total else 1.0
        near = self.allocator(size_problem(self.prediction.rows, goal, of_total, factorable, NEIGHBOUR))
        attempt = self._attempt(chosen, self._informed(chosen, near))
        return Outcome(attempt, kept <= goal.value * (1 + 1e-9), f"{kept:.3f} of the {problem.cost} remain")
