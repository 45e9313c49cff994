"""Measure a model against its original on the zoo's evaluation data: both run, on the same samples, batch by batch."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.zoo.cache import Arrays, load_arrays
from benchmarks.zoo.model import SOURCE, Outputs, ZooModel
from benchmarks.zoo.session import Session

RESAMPLES = 2000


@dataclass(frozen=True)
class Metric:
    """A task metric: the ratio of two sums over the samples.

    Attributes:
        value: Of the measured model.
        original: Of the original.
        drop: How much worse the measured model is; negative where it is better.
        drop_ci95: Bootstrap interval of the drop, both models resampled alike, whole sources at a time.
        samples: How many samples it was measured on.
        sources: From how many sources they were cut; as many as samples where they are independent.
    """

    value: float
    original: float
    drop: float
    drop_ci95: tuple[float, float]
    samples: int
    sources: int


@dataclass
class Fidelity:
    """Distance of the floating-point outputs from the original's, all outputs taken as one vector.

    Attributes:
        worst: Largest absolute difference.
    """

    worst: float = 0.0
    _squares: list[NDArray[np.float64]] = field(default_factory=list[NDArray[np.float64]])

    def add(self, outputs: Outputs, reference: Outputs, samples: int) -> None:
        """Take in one batch. An output without a leading batch axis counts for the batch's first sample."""
        squares = np.zeros((samples, 4))
        for got, expected in zip(outputs, reference, strict=True):
            rows = samples if expected.ndim and len(expected) == samples else 1
            a, b = (array.astype(np.float64).reshape(rows, -1) for array in (got, expected))
            difference = a - b
            self.worst = max(self.worst, float(np.abs(difference).max(initial=0.0)))
            pairs = ((difference, difference), (b, b), (a, b), (a, a))
            squares[:rows] += np.stack([np.einsum("nk,nk->n", x, y) for x, y in pairs], axis=1)
        self._squares.append(squares)

    def as_row(self, source: NDArray[Any] | None = None) -> dict[str, float]:
        """Relative L2 error with its bootstrap interval (by source), cosine, largest difference, samples."""
        squares = np.concatenate(self._squares)
        grouped = _by_source(squares.T, source)
        difference, expected, product, got = grouped.sum(1)
        resampled = _resample_weights(grouped.shape[1]) @ grouped[:2].T
        with np.errstate(divide="ignore", invalid="ignore"):  # a resample of nothing but zeros
            low, high = np.nanpercentile(np.sqrt(resampled[:, 0] / resampled[:, 1]), [2.5, 97.5])
        return {
            "relative_error": float(np.sqrt(difference / expected)) if expected else float(difference > 0),
            "relative_error_low": float(low),
            "relative_error_high": float(high),
            "cosine": float(product / np.sqrt(expected * got)) if expected * got else 0.0,
            "max_abs": self.worst,
            "samples": len(squares),
        }


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured; the first metric is the model's main one."""

    name: str
    model: str
    metrics: dict[str, Metric]
    fidelity: dict[str, float]
    seconds: float

    def as_row(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def batches(data: Arrays, size: int) -> Iterator[dict[str, NDArray[Any]]]:
    """Slices of all arrays along their leading axis."""
    samples = len(next(iter(data.values())))
    for start in range(0, samples, size):
        yield {name: array[start : start + size] for name, array in data.items()}


def evaluate(model: ZooModel, cache: Path, candidate: Path) -> Evaluation:
    """Run candidate and original over the evaluation data.

    Args:
        model: The zoo model `candidate` was made from.
        cache: The zoo's cache.
        candidate: The ONNX file to measure; may be the original.
    """
    original = model.build(cache)
    started = time.perf_counter()
    reference_session = Session(original)
    same = candidate.resolve() == original.resolve()
    session = reference_session if same else Session(candidate)
    data = load_arrays(original.with_name("evaluation.npz"))
    fidelity = Fidelity()
    sums: dict[str, list[NDArray[np.float64]]] = {}
    for batch in batches(data, model.batch):
        reference = model.run(reference_session, batch)
        outputs = reference if same else model.run(session, batch)
        fidelity.add(outputs, reference, len(next(iter(batch.values()))))
        expected = model.score(reference, reference, batch, original.parent)
        for name, pair in model.score(outputs, reference, batch, original.parent).items():
            sums.setdefault(name, []).append(np.stack([*pair, *expected[name]]))
    source = data.get(SOURCE)
    metrics = {
        name: paired(np.concatenate(parts, axis=1), source, higher_is_better=model.higher_is_better)
        for name, parts in sums.items()
    }
    return Evaluation(model.name, str(candidate), metrics, fidelity.as_row(source), time.perf_counter() - started)


def paired(sums: NDArray[np.float64], source: NDArray[Any] | None, *, higher_is_better: bool) -> Metric:
    """The metric of both models and the interval of its drop.

    Args:
        sums: Rows numerator, denominator, original's numerator, original's denominator; (4, samples).
        source: What each sample was cut from, (samples,); None where samples are independent.
        higher_is_better: Whether the metric is.
    """
    told = (sums[1] > 0) | (sums[3] > 0)  # a sample without a denominator says nothing
    grouped = _by_source(sums[:, told], None if source is None else source[told])
    weights = _resample_weights(grouped.shape[1])

    def drop(totals: NDArray[np.float64]) -> NDArray[np.float64]:
        value, original = totals[..., 0] / totals[..., 1], totals[..., 2] / totals[..., 3]
        return original - value if higher_is_better else value - original

    total = grouped.sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):  # a resample may hold no denominator at all
        low, high = np.nanpercentile(drop(weights @ grouped.T), [2.5, 97.5])
    return Metric(
        value=float(total[0] / total[1]),
        original=float(total[2] / total[3]),
        drop=float(drop(total)),
        drop_ci95=(float(low), float(high)),
        samples=int(told.sum()),
        sources=grouped.shape[1],
    )


def _by_source(sums: NDArray[np.float64], source: NDArray[Any] | None) -> NDArray[np.float64]:
    """Sums (kinds, samples) added up over the samples of each source: (kinds, sources)."""
    if source is None:
        return sums
    _, unit = np.unique(source, return_inverse=True)
    return np.stack([np.bincount(unit, row).astype(np.float64) for row in sums])


def _resample_weights(units: int) -> NDArray[np.int64]:
    """How often each unit is drawn, in every resample of the bootstrap: (RESAMPLES, units)."""
    return np.random.default_rng(0).multinomial(units, np.full(units, 1 / units), size=RESAMPLES)
