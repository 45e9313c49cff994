"""Measure a model against its original on the zoo's evaluation data: both run, on the same samples, batch by batch."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.zoo.cache import Arrays, load_arrays
from benchmarks.zoo.model import Outputs, ZooModel
from benchmarks.zoo.session import Session

RESAMPLES = 2000


@dataclass(frozen=True)
class Metric:
    """A task metric: the ratio of two sums over the samples.

    Attributes:
        value: Of the measured model.
        original: Of the original.
        drop: How much worse the measured model is; negative where it is better.
        drop_ci95: Bootstrap interval of the drop, both models resampled alike.
        samples: How many samples it was measured on.
    """

    value: float
    original: float
    drop: float
    drop_ci95: tuple[float, float]
    samples: int


@dataclass
class Fidelity:
    """Distance of the floating-point outputs from the original's, all outputs taken as one vector.

    Attributes:
        samples: Samples seen.
        worst: Largest absolute difference.
    """

    samples: int = 0
    worst: float = 0.0
    _squares: NDArray[np.float64] = field(default_factory=lambda: np.zeros(4))

    def add(self, outputs: Outputs, reference: Outputs, samples: int) -> None:
        """Take in one batch."""
        self.samples += samples
        for got, expected in zip(outputs, reference, strict=True):
            a, b = got.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
            difference = a - b
            self.worst = max(self.worst, float(np.abs(difference).max(initial=0.0)))
            self._squares += (difference @ difference, b @ b, a @ b, a @ a)

    def as_row(self) -> dict[str, float]:
        """Relative L2 error, cosine, largest difference, samples."""
        difference, expected, product, got = self._squares
        return {
            "relative_error": float(np.sqrt(difference / expected)) if expected else float(difference > 0),
            "cosine": float(product / np.sqrt(expected * got)) if expected * got else 0.0,
            "max_abs": self.worst,
            "samples": self.samples,
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
    metrics = {
        name: _metric(np.concatenate(parts, axis=1), higher_is_better=model.higher_is_better)
        for name, parts in sums.items()
    }
    return Evaluation(model.name, str(candidate), metrics, fidelity.as_row(), time.perf_counter() - started)


def _metric(sums: NDArray[np.float64], *, higher_is_better: bool) -> Metric:
    """From rows (numerator, denominator, original numerator, original denominator) of every sample."""
    rng = np.random.default_rng(0)
    counted = sums[:, (sums[1] > 0) | (sums[3] > 0)]  # a sample without a denominator says nothing
    samples = counted.shape[1]
    weights = rng.multinomial(samples, np.full(samples, 1 / samples), size=RESAMPLES)

    def drop(totals: NDArray[np.float64]) -> NDArray[np.float64]:
        value, original = totals[..., 0] / totals[..., 1], totals[..., 2] / totals[..., 3]
        return original - value if higher_is_better else value - original

    total = counted.sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):  # a resample may hold no denominator at all
        low, high = np.nanpercentile(drop(weights @ counted.T), [2.5, 97.5])
    return Metric(
        value=float(total[0] / total[1]),
        original=float(total[2] / total[3]),
        drop=float(drop(total)),
        drop_ci95=(float(low), float(high)),
        samples=samples,
    )
