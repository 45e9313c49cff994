"""How far the outputs of two models are apart, accumulated batch by batch so that no output is kept.

Relative error is ||candidate - reference||_2 / ||reference||_2. Where an output holds class scores, also how often the
largest class agrees, and the Kullback-Leibler divergence KL(reference || candidate) in nats where it is defined:

* probabilities: every row along the last axis (two classes or more) is nonnegative and sums to 1 within 1e-3;
* logits: named so by the caller, or an output with "logit" in its name; a softmax over the last axis comes first;
* scores: any other output of real numbers of shape (samples, classes >= 2): agreement only, unless the caller says
  that they are logits too;
* values: all else.

Two outputs of different shapes (detections after suppression) count as wholly wrong: error 1, no agreement.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float64]
_TINY = 1e-12
_BLOCK = 1 << 20  # values of a distribution worked on at once
DISTRIBUTIONS = ("probabilities", "logits")
_SUM_TOLERANCE = 1e-3


@dataclass(frozen=True)
class OutputFidelity:
    """Distances of one output over all samples.

    Args:
        name: The output.
        kind: probabilities, logits, scores or values; see the module.
        samples: Samples compared.
        max_absolute: Largest absolute difference.
        mean_absolute: Mean absolute difference.
        relative: Relative L2 error over all samples together.
        cosine: Cosine of the angle between both outputs, all samples together.
        percentiles: Relative error per sample: "50", "90", "99" and "100" percent of samples stay below.
        kl: Mean over rows, in nats; None unless probabilities or logits.
        top1_agreement: Share of rows with the same largest class; None for values.
        shape_mismatches: Samples whose outputs differ in shape.
        non_finite_reference: NaN and infinite elements of the reference.
        non_finite_new: Elements that are finite in the reference only.
    """

    name: str
    kind: str
    samples: int
    max_absolute: float
    mean_absolute: float
    relative: float
    cosine: float
    percentiles: dict[str, float]
    kl: float | None
    top1_agreement: float | None
    shape_mismatches: int
    non_finite_reference: int
    non_finite_new: int

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass
class _Output:
    """Running sums of one output."""

    kind: str
    floating: bool
    floor: float
    elements: int = 0
    largest: float = 0.0
    absolute: float = 0.0
    difference2: float = 0.0
    reference2: float = 0.0
    candidate2: float = 0.0
    dot: float = 0.0
    errors: list[float] = field(default_factory=list[float])
    kl: float = 0.0
    logit_error: float = 0.0
    agreed: int = 0
    rows: int = 0
    mismatches: int = 0
    non_finite_reference: int = 0
    non_finite_new: int = 0


class FidelityMeter:
    """Takes the outputs of both models batch by batch; `result` may be asked at any time after the first.

    Args:
        logits: Outputs the user calls logits.
        scores_are_logits: Whether all outputs that would be scores are logits.
    """

    def __init__(self, logits: Collection[str] = (), *, scores_are_logits: bool = False) -> None:
        self._logits = set(logits)
        self._scores = "logits" if scores_are_logits else "scores"
        self._outputs: dict[str, _Output] = {}

    def update(
        self,
        reference: Mapping[str, object],
        candidate: Mapping[str, object],
        samples: int,
    ) -> None:
        """Add one batch; outputs whose leading axis is not `samples` long count as one sample.

        Sequences, maps and arrays without elements have no distance and are left out of the result.
        """
        for name, first in reference.items():
            second = candidate[name]
            if not (isinstance(first, np.ndarray) and isinstance(second, np.ndarray)) or first.size == second.size == 0:
                continue
            state = self._outputs.get(name)
            if state is None:
                floating = first.dtype.kind not in "iubOUS"
                state = self._outputs[name] = _Output(self._kind(name, first), floating, _floor(first))
            count = samples if first.ndim and len(first) == samples else 1
            if first.shape != second.shape:
                _add_mismatch(state, first, count)
            elif first.dtype.kind in "OUS":
                _add(state, np.ones((count, first.size // count)), (first == second).reshape(count, -1).astype(float))
            else:
                before, after = first.astype(np.float64), second.astype(np.float64)
                _add(state, before.reshape(count, -1), after.reshape(count, -1))
                if state.kind != "values":
                    _add_rows(state, before.reshape(-1, first.shape[-1]), after.reshape(-1, first.shape[-1]))

    def result(self) -> tuple[OutputFidelity, ...]:
        """One entry per output, in the order of the graph."""
        return tuple(_finish(name, state) for name, state in self._outputs.items())

    @property
    def relative_error(self) -> float:
        """Relative L2 error of all outputs of real numbers together; of all outputs if there is no such output."""
        states = [state for state in self._outputs.values() if state.floating] or list(self._outputs.values())
        return _ratio(sum(state.difference2 for state in states), sum(state.reference2 for state in states))

    @property
    def loss(self) -> float:
        """Damage to all outputs, second order in small errors: `logit_error` of distributions, squared relative error.

        Samples whose outputs have another shape are off by all of themselves.
        """
        states = [state for state in self._outputs.values() if state.floating] or list(self._outputs.values())
        return sum(map(_damage, states))

    def _kind(self, name: str, array: NDArray[np.generic]) -> str:
        if array.ndim < 2 or array.shape[-1] < 2 or array.dtype.kind in "iubOUS":
            return "values"
        if name in self._logits or "logit" in name.lower():
            return "logits"
        if _is_distribution(array.astype(np.float64)):
            return "probabilities"
        return self._scores if array.ndim == 2 else "values"


def _damage(state: _Output) -> float:
    if state.kind not in DISTRIBUTIONS or not state.rows:
        return _ratio(state.difference2, state.reference2) ** 2  # what has another shape is in it
    return state.logit_error / state.rows + state.mismatches / len(state.errors)


def relative_error(reference: Mapping[str, object], candidate: Mapping[str, object]) -> float:
    """Relative L2 error of one batch over all outputs; see `FidelityMeter.relative_error`."""
    meter = FidelityMeter()
    meter.update(reference, candidate, 1)
    return meter.relative_error


def _add(state: _Output, before: Rows, after: Rows) -> None:
    both = np.isfinite(before) & np.isfinite(after)
    state.non_finite_reference += int(np.count_nonzero(~np.isfinite(before)))
    state.non_finite_new += int(np.count_nonzero(np.isfinite(before) & ~np.isfinite(after)))
    before, after = np.where(both, before, 0.0), np.where(both, after, 0.0)
    difference = np.abs(after - before)
    per_sample, norms = np.sum(difference**2, axis=1), np.sum(before**2, axis=1)
    state.elements += before.size
    state.largest = max(state.largest, float(difference.max(initial=0.0)))
    state.absolute += float(difference.sum())
    state.difference2 += float(per_sample.sum())
    state.reference2 += float(norms.sum())
    state.candidate2 += float(np.sum(after**2))
    state.dot += float(np.sum(before * after))
    state.errors.extend(_ratio(float(d), float(n)) for d, n in zip(per_sample, norms, strict=True))


def _add_rows(state: _Output, before: Rows, after: Rows) -> None:
    state.rows += len(before)
    state.agreed += int(np.count_nonzero(before.argmax(axis=1) == after.argmax(axis=1)))
    if state.kind == "probabilities" and not _is_distribution(before):
        state.kind = "scores"
    if state.kind not in DISTRIBUTIONS:
        return
    step = max(_BLOCK // before.shape[1], 1)
    for start in range(0, len(before), step):
        p, q = before[start : start + step], after[start : start + step]
        p, q = (_softmax(p), _softmax(q)) if state.kind == "logits" else (p, np.maximum(q, 0.0))
        terms = p * (np.log(np.maximum(p, _TINY)) - np.log(np.maximum(q, _TINY)))
        state.kl += float(np.nansum(terms))
        state.logit_error += logit_error(p, q, state.floor)


def logit_error(p: Rows, q: Rows, floor: float) -> float:
    """Sum over the rows of half the variance over the classes of log q - log p.

    To second order it is the divergence of rows whose classes are all as likely. It goes on growing where the
    divergence of other rows has settled what the class is, so that errors of several layers add up. A constant added to
    logits changes nothing. Classes the reference gives no more than `floor` do not count: masked ones, and those that
    are lost in rounding; nor do values that are NaN.

    Args:
        p: The reference, (rows, classes).
        q: The other.
        floor: Smaller probabilities of q count as this.
    """
    counted = p > floor  # false for NaN
    classes = np.maximum(counted.sum(axis=1, keepdims=True), 1)
    difference = np.zeros_like(p)
    np.log(np.maximum(q, floor) / np.where(counted, p, 1.0), out=difference, where=counted & np.isfinite(q))
    difference -= np.where(counted, difference.sum(axis=1, keepdims=True) / classes, 0.0)
    return float(np.sum(np.sum(difference**2, axis=1) / classes[:, 0])) / 2


def _add_mismatch(state: _Output, before: NDArray[np.generic], count: int) -> None:
    state.mismatches += count
    state.errors.extend([1.0] * count)
    if before.dtype.kind not in "OUS":
        norm = float(np.sum(np.nan_to_num(before.astype(np.float64)) ** 2))
        state.difference2 += norm
        state.reference2 += norm


def _finish(name: str, state: _Output) -> OutputFidelity:
    quantiles = np.percentile(state.errors, (50, 90, 99, 100))
    norms = np.sqrt(state.reference2 * state.candidate2)
    classes = state.kind != "values" and state.rows > 0
    return OutputFidelity(
        name=name,
        kind=state.kind,
        samples=len(state.errors),
        max_absolute=state.largest,
        mean_absolute=state.absolute / max(state.elements, 1),
        relative=_ratio(state.difference2, state.reference2),
        cosine=min(1.0, state.dot / norms) if norms > 0 else float(state.reference2 == state.candidate2),
        percentiles=dict(zip(("50", "90", "99", "100"), map(float, quantiles), strict=True)),
        kl=max(0.0, state.kl / state.rows) if classes and state.kind != "scores" else None,
        top1_agreement=state.agreed / state.rows if classes else None,
        shape_mismatches=state.mismatches,
        non_finite_reference=state.non_finite_reference,
        non_finite_new=state.non_finite_new,
    )


def _ratio(difference2: float, reference2: float) -> float:
    """sqrt(difference2 / reference2); 0 where both vanish, and never infinite, as JSON has no such number."""
    return float(np.sqrt(difference2) / max(np.sqrt(reference2), _TINY))


def _is_distribution(array: NDArray[np.float64]) -> bool:
    with np.errstate(invalid="ignore"):
        sums = array.sum(axis=-1)
        return bool(array.size) and bool((array >= 0).all() and (np.abs(sums - 1) <= _SUM_TOLERANCE).all())


def _floor(array: NDArray[np.generic]) -> float:
    """The smallest probability that half or single precision hold in full; of double precision that of single."""
    return float(np.finfo(np.float16 if array.dtype == np.float16 else np.float32).tiny)


def _softmax(rows: Rows) -> Rows:
    with np.errstate(invalid="ignore"):
        exponentials = np.exp(rows - rows.max(axis=1, keepdims=True))
        return exponentials / exponentials.sum(axis=1, keepdims=True)
