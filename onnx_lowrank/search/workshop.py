"""Choices become models: made, timed in turns, rid of chains that gain nothing, or given up for the original."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from onnx_lowrank.allocators import Allocator
from onnx_lowrank.candidates import Candidate, loss_of
from onnx_lowrank.latency.child import MeasuringError
from onnx_lowrank.latency.measure import Paired
from onnx_lowrank.plan import DATA_FREE, Plan
from onnx_lowrank.search.attempt import Attempt, Outcome, same, scaled_ms
from onnx_lowrank.search.bench import Bench
from onnx_lowrank.search.guard import doubtful, guarded
from onnx_lowrank.search.prediction import Prediction
from onnx_lowrank.search.racer import Contestant

logger = logging.getLogger(__name__)
# A doubtful chain is left out if the model without it is at least this fast in comparison (see `guard`).
NO_SLOWER = 0.995


@dataclass(frozen=True, eq=False)
class Workshop:
    """What every search works with.

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

    def timed(self, attempt: Attempt) -> Attempt:
        """The attempt with original, normalized and its model run in turns."""
        race, level = self.bench.racer.trial([self.original, self.normalized], attempt.path)
        return replace(attempt, level=level, race=race)

    def _attempt(self, chosen: Sequence[Candidate], prediction: Prediction, *, finished: bool = False) -> Attempt:
        """The model of a choice: refitted, or, where only its latency matters yet, as it comes."""
        plan = self.plan_of(prediction.as_timed(chosen))
        path, record = self.bench.finish(plan) if finished else self.bench.realise(plan)
        ms = prediction.ms(chosen)
        return Attempt(prediction.as_timed(chosen), plan, path, record, ms, ms / prediction.normalized_ms)

    def _keep_all(self) -> tuple[Candidate, ...]:
        return tuple(row.keep for row in self.prediction.rows if row.factorable)

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
