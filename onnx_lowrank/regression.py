"""One chain fitted to what its layer has to answer: reduced-rank regression, for every chain.

    M_ls = (E[y c^T] + lambda M) A^-1,    A = E[c c^T] + lambda I

is the best dense weight, pulled towards the old one by lambda; the chain is the best approximation of M_ls in the
metric A (`Decomposition.factorize`), improved by `multilinear.refine`. With a bias all moments are central and the mean
goes into the bias. In front of a ReLU the targets are relaxed and fitted again (see `LayerData.relaxed`). Lambda, and
whether to take any of this, are chosen on samples that were not fitted on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.linalg

from onnx_lowrank.calibration.layer_data import LayerData
from onnx_lowrank.calibration.moments import Accumulator, CrossAccumulator, Moments
from onnx_lowrank.chain import Chain, Fit
from onnx_lowrank.decomposition import Decomposition, Rank
from onnx_lowrank.layer import Array, Layer
from onnx_lowrank.multilinear import refine

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
RELAXATIONS = 2
LARGE = 2048


@dataclass(frozen=True, eq=False)
class Chosen:
    """A layer of the graph that is walked through, and what it becomes: a chain, or itself with new weights.

    Args:
        layer: The layer.
        method: The decomposition; None: the layer keeps its shape.
        rank: Of the decomposition.
    """

    layer: Layer
    method: Decomposition | None = None
    rank: Rank = ()

    @property
    def chain(self) -> Chain:
        """Shapes of the chain."""
        shape = self.layer.shape
        return Chain.unfactored(shape) if self.method is None else self.method.chain(shape, self.rank)

    def factors(self, weight: Array, gram: Array | None = None) -> tuple[Array, ...]:
        """The chain nearest to `weight`, in the metric of `gram` where it is given."""
        weight = weight.reshape(self.layer.shape.weight)
        return (weight,) if self.method is None else tuple(self.method.factorize(weight, gram).factors(self.rank))

    def refined(self, factors: Sequence[Array], weight: Array, gram: Array) -> tuple[Array, ...]:
        """Better factors, by least squares; one factor alone is the weight itself."""
        weight = weight.reshape(self.layer.shape.weight)
        if self.method is None:
            return (weight,)
        # Large ones in float32: twice as fast, and the factors are judged on samples anyway.
        metric = gram.astype(np.float32) if gram.shape[-1] >= LARGE else gram
        return refine(self.chain, factors, weight, metric)


@dataclass(frozen=True, eq=False)
class Refitted:
    """The outcome for one layer.

    Args:
        fit: The arrays; None where a layer that keeps its shape is best left alone.
        error_before: Relative error of the layer's outputs on the judging samples without refit: the weight
            approximated on the inputs the compressed network gives.
        error: The same with `fit`; never larger.
        what: What was taken, for the log.
        regressed: Whether anything but approximating the weight was tried.
    """

    fit: Fit | None
    error_before: float
    error: float
    what: str
    regressed: bool = True


@dataclass(frozen=True, eq=False)
class _Try:
    """Factors, the dense weight and bias they stand for, and their error."""

    what: str
    factors: tuple[Array, ...]
    matrix: Array
    bias: Array | None
    error: float


Try = Callable[[str, tuple[Array, ...], Moments], _Try]


def fit_chain(one: Chosen, data: LayerData, inside: Array | None, *, regress: bool = True) -> Refitted:
    """The arrays of one chain that err least on the judging samples.

    Args:
        one: The layer and its chain.
        data: Its rows.
        inside: The bias its outputs hold now, (groups * out,); None: it has none, and moments about zero count.
        regress: Fit to the original's outputs; else only approximate the weight on the inputs that come.
    """
    shape, centred = one.layer.shape, inside is not None
    weight = one.layer.read().astype(np.float64).reshape(shape.groups, shape.out, -1)
    sums = Accumulator(shape.groups, weight.shape[2], shape.out)
    for block in data.fit:
        sums.add(block.inputs(), block.own)
    moments = sums.moments()
    if not moments.count:
        return Refitted(
            None if one.method is None else Fit(one.factors(weight)), math.nan, math.nan, "data-free: no rows"
        )

    def tried(what: str, factors: tuple[Array, ...], seen: Moments) -> _Try:
        matrix = one.chain.dense(factors).reshape(weight.shape)
        bias = seen.y_mean - np.einsum("gsn,gn->gs", matrix, seen.mean) if centred else None
        return _Try(what, factors, matrix, bias, data.error(matrix, bias))

    plain = tried("whitened", one.factors(weight, moments.shrunk(centred=centred)), moments)
    if one.method is None:
        bias = None if inside is None else inside.reshape(shape.groups, shape.out)
        plain = replace(plain, what="kept", bias=bias, error=data.error(weight, bias))
    best = plain
    if regress:
        share, wanted = _regressed(weight, moments, data, centred=centred)
        gram = ridged(moments.gram(centred=centred), share)
        start = tried(f"regression, ridge {share:g}", one.factors(wanted, gram), moments)
        found = [plain, start]
        if one.method is not None:
            found.append(tried(f"{start.what}, refined", one.refined(start.factors, wanted, gram), moments))
        best = min(found, key=lambda entry: entry.error)
        if data.relu:
            best = _relaxed(one, data, moments, weight, share, best, tried)
    kept = one.method is None and best is plain
    change = None if best.bias is None or inside is None else best.bias.reshape(-1) - inside
    fit = None if kept else Fit(best.factors, change)
    return Refitted(fit, plain.error, best.error, best.what, regress)


def _relaxed(
    one: Chosen, data: LayerData, moments: Moments, weight: Array, share: float, best: _Try, tried: Try
) -> _Try:
    """Fitted again and again to what the ReLU lets through, as long as that helps on the judging samples."""
    centred = best.bias is not None
    gram = ridged(moments.gram(centred=centred), share)
    for _ in range(RELAXATIONS):
        sums = CrossAccumulator(moments)
        for rows, targets in data.relaxed(best.matrix, best.bias):
            sums.add(rows, targets)
        seen = sums.moments()
        wanted = _solved(weight, seen, share, centred=centred)
        new = tried(f"ReLU, ridge {share:g}", one.refined(best.factors, wanted, gram), seen)
        if new.error >= best.error:
            break
        best = new
    return best


def _regressed(weight: Array, moments: Moments, data: LayerData, *, centred: bool) -> tuple[float, Array]:
    """The ridge that is best for the judging samples, and the dense weight it gives."""
    found: list[tuple[float, float, Array]] = []
    for share in RIDGES:
        solved = _solved(weight, moments, share, centred=centred)
        bias = moments.y_mean - np.einsum("gsn,gn->gs", solved, moments.mean) if centred else None
        found.append((data.error(solved, bias), share, solved))
    _, share, best = min(found, key=lambda entry: entry[0])
    return share, best


def _solved(weight: Array, moments: Moments, share: float, *, centred: bool) -> Array:
    """M_ls, (groups, out, n)."""
    gram = moments.gram(centred=centred)
    right = moments.target(centred=centred) + (share * _levels(gram))[:, None, None] * weight
    return np.stack([_solve(a, b) for a, b in zip(ridged(gram, share), right, strict=True)])


def _levels(gram: Array) -> Array:
    level = np.trace(gram, axis1=1, axis2=2) / gram.shape[-1]
    return np.where(level > 0, level, 1.0)


def ridged(gram: Array, share: float) -> Array:
    """G + lambda I, lambda a share of the mean of G's diagonal."""
    result = gram.copy()
    index = np.arange(gram.shape[-1])
    result[:, index, index] += (share * _levels(gram))[:, None]
    return result


def _solve(gram: Array, right: Array) -> Array:
    """X with X gram = right."""
    try:
        factor = scipy.linalg.cho_factor(gram, lower=True, check_finite=False)
    except scipy.linalg.LinAlgError:  # rounding of nearly dependent inputs
        return np.linalg.lstsq(gram, right.T, rcond=1e-7)[0].T
    return scipy.linalg.cho_solve(factor, right.T, check_finite=False).T
