"""Task metrics on arrays, one score per sample and higher is better, and intervals around their means.

Wilson's score interval (Wilson 1927) for shares, the percentile bootstrap (Efron 1979) for everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.errors import InputError

Scores = NDArray[np.float64]
_Z95 = 1.959963984540054
_RESAMPLES = 2000
_BLOCK = 1_000_000  # values drawn at once, to bound memory


@dataclass(frozen=True)
class Estimate:
    """A mean over samples with its 95 % interval."""

    value: float
    low: float
    high: float
    samples: int

    def to_dict(self) -> dict[str, float | int | list[float]]:
        """Plain values for JSON."""
        return {"value": self.value, "ci95": [self.low, self.high], "samples": self.samples}

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def top1(output: NDArray[np.generic], labels: NDArray[np.generic]) -> Scores:
    """1 where the largest class of (samples, classes) is the label, else 0."""
    return _top(output, labels, 1)


def top5(output: NDArray[np.generic], labels: NDArray[np.generic]) -> Scores:
    """1 where the label is among the five largest classes of (samples, classes), else 0."""
    return _top(output, labels, 5)


def mse(output: NDArray[np.generic], labels: NDArray[np.generic]) -> Scores:
    """Minus the mean squared difference of each sample, so that higher is better."""
    output, labels = _rows(output, labels)
    return -np.mean((output - labels) ** 2, axis=1)


def cosine(output: NDArray[np.generic], labels: NDArray[np.generic]) -> Scores:
    """Cosine of the angle between each sample's output and its label."""
    output, labels = _rows(output, labels)
    norms = np.linalg.norm(output, axis=1) * np.linalg.norm(labels, axis=1)
    return np.sum(output * labels, axis=1) / np.maximum(norms, np.finfo(np.float64).tiny)


Metric = Callable[[NDArray[np.generic], NDArray[np.generic]], Scores]
METRICS: dict[str, Metric] = {"top1": top1, "top5": top5, "mse": mse, "cosine": cosine}


def metric_named(name: str) -> Metric:
    """The task metric of this name.

    Raises:
        InputError: if there is none.
    """
    if name not in METRICS:
        raise InputError(f"--metric {name}", f"one of {', '.join(METRICS)}", "name one of these")
    return METRICS[name]


def estimate(scores: Scores, seed: int) -> Estimate:
    """Mean of per-sample scores: Wilson's interval where all are 0 or 1, else the bootstrap's."""
    if np.isin(scores, (0.0, 1.0)).all():
        return wilson(int(scores.sum()), len(scores))
    return bootstrap_mean(scores, seed)


def wilson(successes: int, samples: int) -> Estimate:
    """A share of successes with Wilson's 95 % score interval."""
    share, z2 = successes / samples, _Z95**2
    centre = (share + z2 / (2 * samples)) / (1 + z2 / samples)
    half = _Z95 / (1 + z2 / samples) * np.sqrt(share * (1 - share) / samples + z2 / (4 * samples**2))
    return Estimate(share, max(0.0, float(centre - half)), min(1.0, float(centre + half)), samples)


def bootstrap_mean(values: Scores, seed: int) -> Estimate:
    """A mean with its 95 % percentile bootstrap interval; the same seed gives the same interval."""
    rng, count = np.random.default_rng(seed), len(values)
    block = max(1, _BLOCK // count)
    sizes = (min(block, _RESAMPLES - done) for done in range(0, _RESAMPLES, block))
    means = [values[rng.integers(count, size=(size, count))].mean(axis=1) for size in sizes]
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return Estimate(float(values.mean()), float(low), float(high), count)


def paired_difference(before: Scores, after: Scores, seed: int) -> Estimate:
    """Mean of after - before over the same samples, resampled in pairs."""
    return bootstrap_mean(after - before, seed)


def _top(output: NDArray[np.generic], labels: NDArray[np.generic], k: int) -> Scores:
    if output.ndim != 2 or labels.shape != output.shape[:1] or labels.dtype.kind not in "iu":
        found = f"labels {labels.dtype} {labels.shape} for an output {output.shape}"
        raise InputError(found, "one class number per sample and an output (samples, classes)", "choose another metric")
    if labels.min() < 0 or labels.max() >= output.shape[1]:
        found = f"labels from {labels.min()} to {labels.max()} for {output.shape[1]} classes"
        raise InputError(found, "class numbers counted from 0", "correct the labels")
    if k == 1:
        return (np.argmax(output, axis=1) == labels).astype(np.float64)
    best = np.argsort(output, axis=1, kind="stable")[:, ::-1][:, :k]
    return (best == labels[:, None]).any(axis=1).astype(np.float64)


def _rows(output: NDArray[np.generic], labels: NDArray[np.generic]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if labels.size != output.size or len(labels) != len(output) or labels.dtype.kind not in "fiub":
        found = f"labels {labels.dtype} {labels.shape} for an output {output.shape}"
        raise InputError(found, "numbers shaped like the output", "choose another metric")
    return (
        output.reshape(len(output), -1).astype(np.float64),
        labels.reshape(len(labels), -1).astype(np.float64),
    )
