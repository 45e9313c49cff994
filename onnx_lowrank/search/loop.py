"""Closing the loop: allocate, realise, measure, correct the prediction, allocate again; a few rounds at most."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from onnx_lowrank.allocators import Allocator
from onnx_lowrank.candidates import Candidate, loss_of
from onnx_lowrank.goals import Goal, KeepMacs, KeepParams, LatencyMs, Speedup
from onnx_lowrank.latency.child import MeasuringError
from onnx_lowrank.latency.measure import Paired
from onnx_lowrank.plan import DATA_FREE, Plan
from onnx_lowrank.search.attempt import Attempt, Outcome, mixed, same, scaled_ms, standing, straddling
from onnx_lowrank.search.bench import Bench
from onnx_lowrank.search.guard import doubtful, guarded
from onnx_lowrank.search.prediction import NEIGHBOUR, Prediction, size_problem
from onnx_lowrank.search.racer import Contestant
from onnx_lowrank.search.trail import Trail

logger = logging.getLogger(__name__)
ROUNDS = 7
ERROR_PROBES = 7
ALLOCATIONS = 12
# Aim this much beyond a speed goal: a model that lands exactly on it misses by noise half of the time.
AIM = 1.02
# Choose by this share of an error limit: the samples it is reported on are others.
ERROR_AIM = 0.9
# Faster than the goal by more than this is accuracy given away: try again with the corrected prediction.
OVERSHOOT = 1.03
# A doubtful chain is left out if the model without it is at least this fast in comparison (see `guard`).
NO_SLOWER = 0.995


@dataclass(frozen=True, eq=False)
class Loop:
    """One search.

    Args:
        bench: Realises and times.
        prediction: The priced table.
        baseline: The original and the normalized model in turns, before anything was factorized.
        allocator: The rank rule.
        original: The user's model at its best level.
        normalized: The model before factorization, likewise.
        plan_of: Makes the plan of a choice.
        error_of: Relative error of a file's outputs against the original's.
        damage: What models that reach a goal are compared by: what the rule minimises, measured if it measures.
        additive: Whether the rule minimises the sum of predicted losses: parts of two of its choices then make a third.
    """

    bench: Bench
    prediction: Prediction
    baseline: Paired
    allocator: Allocator
    original: Contestant
    normalized: Contestant
    plan_of: Callable[[Sequence[Candidate]], Plan]
    error_of: Callable[[Path], float]
    damage: Callable[[Sequence[Candidate]], float] = loss_of
    additive: bool = True

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

    def _informed(self, chosen: Sequence[Candidate], near: Sequence[Candidate]) -> Prediction:
        """The prediction for `chosen`, corrected by timing another model that is much like it."""
        if self.bench.late or same(chosen, near) or not any(c.chain and not c.exact for c in near):
            return self.prediction
        try:
            other = self.timed(self._attempt(near, self.prediction))
        except MeasuringError as error:
            logger.warning("the prediction is not corrected: %s", error.reason)
            return self.prediction
        return self.prediction.learned(near, scaled_ms(other, self.prediction))

    def _corrected(self, attempt: Attempt, others: Sequence[Sequence[Candidate]]) -> Attempt:
        """The attempt with a prediction corrected by the choice that is most like its own."""
        rest = [chosen for chosen in others if not same(chosen, attempt.chosen)]
        if not rest:
            return attempt
        near = min(rest, key=lambda chosen: abs(self.prediction.ms(chosen) - attempt.predicted_ms))
        ms = self._informed(attempt.chosen, near).ms(attempt.chosen)
        return replace(attempt, predicted_ms=ms, predicted_share=ms / self.prediction.normalized_ms)

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

    def _guarded(self, best: Attempt, allowed: Callable[[Attempt], bool]) -> tuple[Attempt, tuple[str, ...]]:
        """The best attempt without the chains that gain nothing, and their layers' keys; see `guard`.

        Args:
            best: The attempt, timed.
            allowed: Whether another one, no slower, may take its place.
        """
        prediction = self.prediction.learned(best.chosen, scaled_ms(best, self.prediction))

        def without(keys: Collection[str]) -> Attempt | None:
            if self.bench.late:
                return None
            try:
                other = self._without(best, keys, prediction)
            except MeasuringError as error:
                logger.warning("chains stay that might be spared: %s", error.reason)
                return None
            return other if other is not None and allowed(other) else None

        return guarded(best, doubtful(best.chosen, self.prediction.rows), without)

    def _without(self, best: Attempt, keys: Collection[str], prediction: Prediction) -> Attempt | None:
        """The attempt with these layers kept, timed, if the model is no slower for it."""
        dense = {row.layer.key: row.keep for row in prediction.rows}
        fewer = tuple(dense[c.key] if c.key in keys else c for c in best.chosen)
        other = self._attempt(fewer, prediction)
        race, _ = self.bench.racer.trial([Contestant(best.path, best.level)], other.path)
        logger.info("without %d doubtful chains: %s as fast", len(keys), race.ratio(0, 1))
        if race.ratio(0, 1).value < NO_SLOWER:
            return None
        if best.error is not None:  # what is limited is the error of the finished model
            path, record = self.bench.finish(other.plan)
            other = replace(other, path=path, record=record, error=self.error_of(path))
        return self.timed(other)

    def _kept(self, reason: str, *, reached: bool) -> Outcome:
        """Every layer kept: the normalized model where it was measured faster than the original, else the original."""
        attempt = self._attempt(self._keep_all(), self.prediction)
        gain = self.baseline.ratio(0, 1)
        if gain.low > 1:
            return Outcome(attempt, reached, f"{reason}; normalized, the model is {gain} as fast")
        plan = replace(attempt.plan, passes=(), fit=DATA_FREE)
        path, record = self.bench.realise(plan)
        original = replace(attempt, plan=plan, path=path, record=record, predicted_share=gain.value)
        return Outcome(original, reached, f"{reason}; the original is written as it is")

    def _keep_all(self) -> tuple[Candidate, ...]:
        return tuple(row.keep for row in self.prediction.rows if row.factorable)

    def _attempt(self, chosen: Sequence[Candidate], prediction: Prediction, *, finished: bool = False) -> Attempt:
        """The model of a choice: refitted, or, where only its latency matters yet, as it comes."""
        plan = self.plan_of(prediction.as_timed(chosen))
        path, record = self.bench.finish(plan) if finished else self.bench.realise(plan)
        ms = prediction.ms(chosen)
        return Attempt(prediction.as_timed(chosen), plan, path, record, ms, ms / prediction.normalized_ms)

    def timed(self, attempt: Attempt) -> Attempt:
        """The attempt with original, normalized and its model run in turns."""
        race, level = self.bench.racer.trial([self.original, self.normalized], attempt.path)
        return replace(attempt, level=level, race=race)
