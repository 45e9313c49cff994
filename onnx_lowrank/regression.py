"""One chain fitted to what its layer has to answer: reduced-rank regression, for every chain.

    M_ls = (E[y c^T] + lambda M) A^-1,    A = E[c c^T] + lambda I

is the best dense weight, pulled towards the old one by lambda; the chain is the best approximation of M_ls in the
metric A (`Decomposition.factorize`), improved by `multilinear.refine`. With a bias all moments are central and the mean
goes into the bias. In front of a ReLU the targets are relaxed and fitted again (see `LayerData.relaxed`). Lambda, and
whether to take any of this, are chosen on samples that were not fitted on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import scipy.linalg

from onnx_lowrank.calibration.layer_data import LayerData
from onnx_lowrank.calibration.moments import Accumulator, CrossAccumulator, Moments
from onnx_lowrank.chain import Chain, Fit
from onnx_lowrank.decomposition import Decomposition, Factorization, Rank
from onnx_lowrank.layer import Array, Layer
from onnx_lowrank.multilinear import refine, working
from onnx_lowrank.row_space import RowSpace

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
SWEEPS = 4
# Relaxed targets are fitted again while that lowers the error by this share, starting from the factors there are.
RELAXATIONS, RELAXED_SWEEPS = 3, 2
GAIN = 0.005


@dataclass(frozen=True, eq=False)
class Chosen:
    """A layer of the graph that is walked through, and what it becomes.

    Args:
        layer: The layer.
        method: The decomposition.
        rank: Of the decomposition.
        known: Factorizations of weights by layer key and method; where there is none for this layer it is made.
    """

    layer: Layer
    method: Decomposition
    rank: Rank
    known: Mapping[tuple[str, str], Factorization] = field(default_factory=dict[tuple[str, str], Factorization])

    @property
    def chain(self) -> Chain:
        """Shapes of the chain."""
        return self.method.chain(self.layer.shape, self.rank)

    def in_space(self, space: RowSpace) -> Chosen:
        """The same of the matrix that stands for the layer in the row space of its weight."""
        return replace(self, layer=replace(self.layer, shape=space.shape, read=lambda: space.weight))

    def factors(self, weight: Array, gram: Array | None = None) -> tuple[Array, ...]:
        """The chain nearest to `weight`, in the metric of `gram` where it is given."""
        weight = weight.reshape(self.layer.shape.weight)
        return tuple(self.method.factorize(weight, gram, most=self.rank).factors(self.rank))

    def started(self, weight: Array, gram: Array) -> tuple[Callable[[], tuple[Array, ...]], tuple[Array, ...]]:
        """The chains nearest to the layer's own weight: without samples (made when called) and by `gram`.

        Args:
            weight: The layer's, (groups, out, n).
            gram: (groups, n, n).
        """
        canonical = weight.reshape(self.layer.shape.weight)
        known = self.known.get((self.layer.key, self.method.name)) if self.method.by_rank else None
        made = None if known is None else known.in_metric(gram, self.rank)
        made = made or self.method.factorize(canonical, gram, most=self.rank)
        calibrated = tuple(made.factors(self.rank))
        return lambda: made.data_free(self.rank) or self.factors(weight), calibrated

    def refined(self, factors: Sequence[Array], weight: Array, gram: Array, sweeps: int) -> tuple[Array, ...]:
        """Better factors, by at most `sweeps` sweeps of least squares."""
        weight = weight.reshape(self.layer.shape.weight)
        return refine(self.chain, factors, weight, working(gram), sweeps=sweeps)


@dataclass(frozen=True, eq=False)
class Refitted:
    """The outcome for one layer.

    Args:
        fit: The arrays.
        error_before: Relative error of the layer's outputs on the judging samples without refit: the weight
            approximated on the inputs the compressed network gives.
        error: The same with `fit`; never larger.
        what: What was taken, for the log.
        regressed: Whether anything but approximating the weight was tried.
    """

    fit: Fit
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
        return Refitted(Fit(one.factors(weight)), math.nan, math.nan, "data-free: no rows")

    def tried(what: str, factors: tuple[Array, ...], seen: Moments) -> _Try:
        matrix = one.chain.dense(factors).reshape(weight.shape)
        bias = seen.y_mean - np.einsum("gsn,gn->gs", matrix, seen.mean) if centred else None
        return _Try(what, factors, matrix, bias, data.error(matrix, bias))

    free, calibrated = one.started(weight, moments.shrunk(centred=centred))
    plain = tried("whitened", calibrated, moments)
    best = plain
    if regress:
        ridge, wanted = _regressed(weight, moments, data, centred=centred)
        what, found, start = f"regression, ridge {ridge.share:g}", [plain], plain.factors
        # A format that is fitted by iteration starts from the chain there is: this weight is not far from the first.
        if not one.method.by_rank:
            found.append(tried(what, one.factors(wanted, ridge.gram), moments))
            start = found[-1].factors
        refined = one.refined(start, wanted, ridge.gram, SWEEPS)
        found.append(tried(f"{what}, refined", refined, moments))
        found.append(corrected := tried("data-free", free(), moments))
        if inside is not None:
            bias = inside.reshape(shape.groups, shape.out)
            error = data.error(corrected.matrix, bias)
            found.append(replace(corrected, what="data-free, the bias as it was", bias=bias, error=error))
        best = min(found, key=lambda entry: entry.error)
        if data.relu:
            best = _relaxed(one, data, moments, ridge, best, tried)
    change = None if best.bias is None or inside is None else best.bias.reshape(-1) - inside
    return Refitted(Fit(best.factors, change), plain.error, best.error, best.what, regress)


def _relaxed(one: Chosen, data: LayerData, moments: Moments, ridge: _Ridge, best: _Try, tried: Try) -> _Try:
    """Fitted again and again to what the ReLU lets through, as long as that helps on the judging samples."""
    for _ in range(RELAXATIONS):
        sums = CrossAccumulator(moments)
        for rows, targets in data.relaxed(best.matrix, best.bias):
            sums.add(rows, targets)
        seen = sums.moments()
        factors = one.refined(best.factors, ridge.solve(seen), ridge.gram, RELAXED_SWEEPS)
        before, new = best.error, tried(f"ReLU, ridge {ridge.share:g}", factors, seen)
        best = min(best, new, key=lambda entry: entry.error)
        if not new.error < before * (1 - GAIN):
            break
    return best


def _regressed(weight: Array, moments: Moments, data: LayerData, *, centred: bool) -> tuple[_Ridge, Array]:
    """The ridge that is best for the judging samples, and the dense weight it gives.

    The error falls and then rises with the ridge: from the middle of the grid on, the way it falls.
    """
    plain = moments.gram(centred=centred)

    def attempt(at: int) -> tuple[float, _Ridge, Array]:
        ridge = _Ridge(weight, plain, RIDGES[at], centred=centred)
        solved = ridge.solve(moments)
        bias = moments.y_mean - np.einsum("gsn,gn->gs", solved, moments.mean) if centred else None
        return data.error(solved, bias), ridge, solved

    middle = len(RIDGES) // 2
    best, other = attempt(middle), attempt(middle - 1)
    rest = range(middle + 1, len(RIDGES)) if best[0] <= other[0] else range(middle - 2, -1, -1)
    best = min(best, other, key=lambda entry: entry[0])
    for at in rest:
        other = attempt(at)
        if other[0] >= best[0]:
            break
        best = other
    return best[1], best[2]


class _Ridge:
    """M_ls for one lambda, whatever the targets: A is factorized once.

    Args:
        weight: The old one, (groups, out, n).
        plain: The inputs' second moment.
        share: Lambda as a share of the mean of its diagonal.
        centred: Whether moments are central.
    """

    def __init__(self, weight: Array, plain: Array, share: float, *, centred: bool) -> None:
        self.share, self._plain, self._centred = share, plain, centred
        self._towards = (share * _levels(self._plain))[:, None, None] * weight
        self._roots = [_root(gram) for gram in self.gram]

    @property
    def gram(self) -> Array:
        """A, (groups, n, n), made anew: kept for every lambda tried, several would be held at once."""
        return ridged(self._plain, self.share)

    def solve(self, moments: Moments) -> Array:
        """M_ls, (groups, out, n), for the targets of `moments`."""
        right = moments.target(centred=self._centred) + self._towards
        return np.stack([self._solved(group, side) for group, side in enumerate(right)])

    def _solved(self, group: int, right: Array) -> Array:
        """X with X A = right."""
        root = self._roots[group]
        if root is None:
            return np.linalg.lstsq(self.gram[group], right.T, rcond=1e-7)[0].T
        return scipy.linalg.cho_solve((root, True), right.T, check_finite=False).T


def _levels(gram: Array) -> Array:
    level = np.trace(gram, axis1=1, axis2=2) / gram.shape[-1]
    return np.where(level > 0, level, 1.0)


def ridged(gram: Array, share: float) -> Array:
    """G + lambda I, lambda a share of the mean of G's diagonal."""
    result = gram.copy()
    index = np.arange(gram.shape[-1])
    result[:, index, index] += (share * _levels(gram))[:, None]
    return result


def _root(gram: Array) -> Array | None:
    """Lower Cholesky factor, in place of `gram`; None where rounding of nearly dependent inputs leaves none."""
    try:
        return scipy.linalg.cholesky(gram.T, lower=True, overwrite_a=True, check_finite=False)
    except scipy.linalg.LinAlgError:
        return None
