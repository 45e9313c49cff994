"""Task metrics, one score per sample and higher is better, and intervals around their means.

A metric of the user's own is a function `module:function`,

    def metric(outputs: dict[str, ndarray], labels: ndarray) -> ndarray

of all outputs by name and the labels of some samples, leading axis samples, that returns (samples,) finite scores.

Wilson's score interval (Wilson 1927) for shares, the percentile bootstrap (Efron 1979) for everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.errors import InputError
from onnx_lowrank.user_function import FORM, described, is_function_name, user_function

Array = NDArray[np.generic]
Scores = NDArray[np.float64]
Outputs = Mapping[str, Array]
Metric = Callable[[Outputs, Array], Scores]
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


def top1(output: Array, labels: Array) -> Scores:
    """1 where the largest class of (samples, classes) is the label, else 0."""
    return _top(output, labels, 1)


def top5(output: Array, labels: Array) -> Scores:
    """1 where the label is among the five largest classes of (samples, classes), else 0."""
    return _top(output, labels, 5)


def mse(output: Array, labels: Array) -> Scores:
    """Minus the mean squared difference of each sample, so that higher is better."""
    output, labels = _rows(output, labels)
    return -np.mean((output - labels) ** 2, axis=1)


def cosine(output: Array, labels: Array) -> Scores:
    """Cosine of the angle between each sample's output and its label."""
    output, labels = _rows(output, labels)
    norms = np.linalg.norm(output, axis=1) * np.linalg.norm(labels, axis=1)
    return np.sum(output * labels, axis=1) / np.maximum(norms, np.finfo(np.float64).tiny)


METRICS: dict[str, Callable[[Array, Array], Scores]] = {"top1": top1, "top5": top5, "mse": mse, "cosine": cosine}


def metric_named(name: str, output: str | None = None) -> Metric:
    """The task metric of this name, or the user's function.

    Args:
        name: A key of `METRICS`, or `module:function`.
        output: The output scored by one of `METRICS`; the first by default.

    Raises:
        InputError: if there is none.
    """
    if is_function_name(name):
        return UserMetric(name, user_function(name))
    if name not in METRICS:
        raise InputError(f"--metric {name}", f"one of {', '.join(METRICS)}, or {FORM}", "name one of these")
    score = METRICS[name]
    return lambda outputs, labels: score(outputs[output or next(iter(outputs))], labels)


@dataclass(frozen=True)
class UserMetric:
    """A function of the user's, what it returns being checked.

    Args:
        name: `module:function`.
        function: See the module.
    """

    name: str
    function: Callable[..., object]

    def __call__(self, outputs: Outputs, labels: Array) -> Scores:
        """(samples,) scores.

        Raises:
            InputError: if it fails, or returns anything but one finite number per sample.
        """
        try:
            scores = np.asarray(self.function(dict(outputs), labels))
        except Exception as error:  # it is the user's code, which may raise anything
            found = f"--metric {self.name}, which failed ({described(error)})"
            raise InputError(found, "a function of (outputs, labels)", "mend it") from error
        if scores.shape != (len(labels),) or scores.dtype.kind not in "fiub":
            found = f"scores {scores.dtype} {scores.shape} of --metric {self.name} for {len(labels)} samples"
            raise InputError(found, f"numbers ({len(labels)},)", "return one per sample")
        if not np.isfinite(scores).all():
            count = int(np.count_nonzero(~np.isfinite(scores)))
            found = f"{count} NaN or infinite scores of --metric {self.name}"
            raise InputError(found, "finite numbers", "mend the function")
        return scores.astype(np.float64)


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


def _top(output: Array, labels: Array, k: int) -> Scores:
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


def _rows(output: Array, labels: Array) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if labels.size != output.size or len(labels) != len(output) or labels.dtype.kind not in "fiub":
        found = f"labels {labels.dtype} {labels.shape} for an output {output.shape}"
        raise InputError(found, "numbers shaped like the output", "choose another metric")
    return (
        output.reshape(len(output), -1).astype(np.float64),
        labels.reshape(len(labels), -1).astype(np.float64),
    )
