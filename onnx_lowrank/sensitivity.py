"""Sensitivity: what the network's outputs lose when one layer is replaced, measured, and interpolated over ranks.

Errors of different layers are not comparable: the same relative error ruins the output at one layer and is forgotten
after another. So a layer is replaced at a few ranks, the rest of the network runs from the activations in front of it,
and the loss of its outputs is taken: their squared relative L2 error, that of distributions on their logits. It is
second order in the error, so losses of several layers add up. The Kullback-Leibler divergence would not: a few
undecided positions flip at small errors, make up most of it, and flip no more at larger ones, so that it sees no
difference between cutting one layer deep and many a little. Between the probes log(loss) is linear in log(error).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnx_lowrank.fidelity import FidelityMeter

PROBES = 4
SMALLEST, RUIN = 1e-12, 1e6
# A loss is second order in the error where both are small.
ORDER = 2.0
Outputs = Mapping[str, object]


@dataclass(frozen=True)
class LossCurve:
    """Probed losses of one layer over the error of its outputs, by ascending error.

    Args:
        errors: Relative errors probed, positive.
        losses: What the network lost.
    """

    errors: tuple[float, ...]
    losses: tuple[float, ...]

    @staticmethod
    def through(points: Iterable[tuple[float, float]]) -> LossCurve:
        """The curve through (error, loss) pairs, made monotone: noise of a probe never makes a worse chain better."""
        ordered = sorted((error, max(loss, SMALLEST)) for error, loss in points if error > 0)
        losses = np.maximum.accumulate([loss for _, loss in ordered])
        return LossCurve(tuple(error for error, _ in ordered), tuple(map(float, losses)))

    def loss(self, error: float) -> float:
        """Predicted loss at `error`; beyond the probes the order of the loss is that of small errors."""
        if error <= 0:
            return 0.0
        if not self.errors:
            return error**ORDER
        low, high = self.errors[0], self.errors[-1]
        if error <= low:
            return self.losses[0] * (error / low) ** ORDER
        if error >= high:
            return self.losses[-1] * (error / high) ** ORDER
        return float(np.exp(np.interp(np.log(error), np.log(self.errors), np.log(self.losses))))


def probe_at(errors: Sequence[float], count: int = PROBES) -> list[int]:
    """Which of the candidates to probe: at most `count`, evenly spaced in log(error), ends included."""
    usable = [i for i, error in enumerate(errors) if error > 0]
    if len(usable) <= count:
        return usable
    logs = {i: np.log(errors[i]) for i in usable}
    marks = np.linspace(min(logs.values()), max(logs.values()), count)
    return sorted({min(usable, key=lambda i: abs(logs[i] - mark)) for mark in marks})


def output_loss(batches: Iterable[tuple[Outputs, Outputs, int]]) -> float:
    """Loss of a network's outputs against the original's, over (original, other, samples) of every batch.

    NaN or infinity where the original has numbers counts as no distance anywhere else; here it is ruin, which no other
    loss exceeds: what is not zero where the original is would be infinitely far.
    """
    meter = FidelityMeter()
    for before, after, count in batches:
        meter.update(before, after, count)
    return RUIN if any(output.non_finite_new for output in meter.result()) else min(meter.loss, RUIN)
