"""Task metrics, one score per sample and higher is better, and intervals around their means.

A metric of the user's own is a function `module:function`,

    def metric(outputs: dict[str, ndarray], labels: ndarray) -> ndarray

of all outputs by name and the labels of some samples, leading axis samples, that returns (samples,) finite scores.

Wilson's score interval (Wilson 1927) for shares, the percentile bootstrap (Efron 1979) for everything else. Where
samples are named after what they come from, whole sources are drawn (the cluster bootstrap; Davison and Hinkley 1997,
section 3.8), as those of one source are alike.

A sample whose output holds NaN has the score NaN, whatever the metric: nothing can be said of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.errors import InputError
from onnx_lowrank.user_function import FORM, described, is_function_name, user_function

Array = NDArray[np.generic]
Scores = NDArray[np.float64]
Outputs = Mapping[str, Array]
Metric = Callable[[Outputs, Array], Scores]
Sources = NDArray[np.str_]
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
    with np.errstate(invalid="ignore", over="ignore"):
        return -np.mean((output - labels) ** 2, axis=1)


def cosine(output: Array, labels: Array) -> Scores:
    """Cosine of the angle between each sample's output and its label."""
    output, labels = _rows(output, labels)
    with np.errstate(invalid="ignore", over="ignore"):
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
        """(samples,) scores; NaN where they are not finite because outputs are not.

        Raises:
            InputError: if it fails, or returns anything but one number per sample, finite where outputs are.
        """
        try:
            scores = np.asarray(self.function(dict(outputs), labels))
        except Exception as error:  # it is the user's code, which may raise anything
            found = f"--metric {self.name}, which failed ({described(error)})"
            raise InputError(found, "a function of (outputs, labels)", "mend it") from error
        if scores.shape != (len(labels),) or scores.dtype.kind not in "fiub":
            found = f"scores {scores.dtype} {scores.shape} of --metric {self.name} for {len(labels)} samples"
            raise InputError(found, f"numbers ({len(labels)},)", "return one per sample")
        if not np.isfinite(scores).all() and all(map(_finite, outputs.values())):
            count = int(np.count_nonzero(~np.isfinite(scores)))
            found = f"{count} NaN or infinite scores of --metric {self.name}"
            raise InputError(found, "finite numbers", "mend the function")
        return np.where(np.isfinite(scores), scores.astype(np.float64), np.nan)


def _finite(output: Array) -> bool:
    return output.dtype.kind != "f" or bool(np.isfinite(output).all())


def estimate(scores: Scores, seed: int, sources: Sources | None = None) -> Estimate:
    """Mean of per-sample scores: Wilson's interval where all are 0 or 1, else the bootstrap's.

    Shares of samples of several sources are bootstrapped too, as Wilson's samples depend on nothing; where all scores
    are alike, and a bootstrap would find no spread, each source counts as one sample of his.
    """
    if not _binary(scores):
        return bootstrap_mean(scores, seed, sources)
    units = _units(len(scores), sources)
    if units == len(scores):
        return wilson(int(scores.sum()), units)
    if scores.min() == scores.max():
        return replace(wilson(int(scores[0]) * units, units), samples=len(scores))
    return bootstrap_mean(scores, seed, sources)


def wilson(successes: int, samples: int) -> Estimate:
    """A share of successes with Wilson's 95 % score interval."""
    share, z2 = successes / samples, _Z95**2
    centre = (share + z2 / (2 * samples)) / (1 + z2 / samples)
    half = _Z95 / (1 + z2 / samples) * np.sqrt(share * (1 - share) / samples + z2 / (4 * samples**2))
    return Estimate(share, max(0.0, float(centre - half)), min(1.0, float(centre + half)), samples)


def bootstrap_mean(values: Scores, seed: int, sources: Sources | None = None) -> Estimate:
    """A mean with its 95 % percentile bootstrap interval; the same seed gives the same interval.

    Args:
        values: (samples,).
        seed: Of the resampling.
        sources: (samples,), what each comes from: whole sources are drawn. None, or one source: samples are.
    """
    sums, counts = _by_source(values, sources)
    rng, count = np.random.default_rng(seed), len(sums)
    block = max(1, _BLOCK // count)
    sizes = (min(block, _RESAMPLES - done) for done in range(0, _RESAMPLES, block))
    draws = (rng.integers(count, size=(size, count)) for size in sizes)
    means = [sums[draw].sum(axis=1) / counts[draw].sum(axis=1) for draw in draws]
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return Estimate(float(values.mean()), float(low), float(high), len(values))


def paired_difference(before: Scores, after: Scores, seed: int, sources: Sources | None = None) -> Estimate:
    """Mean of after - before over the same samples, resampled in pairs, by whole sources where these are named.

    Where no score of 0 or 1 changed in n samples (sources), resampling would find no doubt. Then a share p of changes
    each way that would still go unseen with a probability of 0.025 bounds it, (1 - p)^n = 0.025: the exact interval of
    Clopper and Pearson 1934, and at 0.05 the rule of three (Hanley and Lippman-Hand 1983).
    """
    if _binary(before) and np.array_equal(before, after):
        unseen = 1 - 0.025 ** (1 / _units(len(before), sources))
        return Estimate(0.0, -unseen, unseen, len(before))
    return bootstrap_mean(after - before, seed, sources)


def _binary(scores: Scores) -> bool:
    return bool(np.isin(scores, (0.0, 1.0)).all())


def _units(samples: int, sources: Sources | None) -> int:
    """How many things were drawn independently: sources, or samples where all or none come from one."""
    count = 1 if sources is None else len(np.unique(sources))
    return count if count > 1 else samples


def _by_source(values: Scores, sources: Sources | None) -> tuple[Scores, Scores]:
    """Sums and numbers of the values of each unit, see `_units`."""
    if sources is None or _units(len(values), sources) == len(values):
        return values, np.ones_like(values)
    _, member = np.unique(sources, return_inverse=True)
    return np.bincount(member, values).astype(np.float64), np.bincount(member).astype(np.float64)


def _top(output: Array, labels: Array, k: int) -> Scores:
    if output.ndim != 2 or labels.shape != output.shape[:1] or labels.dtype.kind not in "iu":
        found = f"labels {labels.dtype} {labels.shape} for an output {output.shape}"
        raise InputError(found, "one class number per sample and an output (samples, classes)", "choose another metric")
    if labels.min() < 0 or labels.max() >= output.shape[1]:
        found = f"labels from {labels.min()} to {labels.max()} for {output.shape[1]} classes"
        raise InputError(found, "class numbers counted from 0", "correct the labels")
    if k == 1:
        hits = np.argmax(output, axis=1) == labels
    else:
        hits = (np.argsort(output, axis=1, kind="stable")[:, ::-1][:, :k] == labels[:, None]).any(axis=1)
    return np.where(np.isnan(output.astype(np.float64)).any(axis=1), np.nan, hits)


def _rows(output: Array, labels: Array) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if labels.size != output.size or len(labels) != len(output) or labels.dtype.kind not in "fiub":
        found = f"labels {labels.dtype} {labels.shape} for an output {output.shape}"
        raise InputError(found, "numbers shaped like the output", "choose another metric")
    return (
        output.reshape(len(output), -1).astype(np.float64),
        labels.reshape(len(labels), -1).astype(np.float64),
    )
