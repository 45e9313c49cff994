"""What singular values say about a matrix: measures of how low its rank is, and the rank a noise model finds in it.

The analytic solution of empirical variational Bayesian matrix factorization (EVB; Nakajima, Sugiyama, Babacan and
Tomioka, JMLR 14, 2013) takes X = A + noise of variance s^2 per element, X being L x M with L <= M and alpha = L / M. A
component is kept if its observed singular value gamma exceeds

    gamma^2 / (M s^2) > xbar = (1 + tau) (1 + alpha / tau),    tau = 2.5129 sqrt(alpha),

and s^2 minimises the free energy: with x_h = gamma_h^2 / (M s^2), x_h - log x_h of every component that is noise plus

    x_h - tau(x_h) + log((tau(x_h) + 1) / x_h) + alpha log(tau(x_h) / alpha + 1)

of every one that is kept, 2 tau(x) = x - 1 - alpha + sqrt((x - 1 - alpha)^2 - 4 alpha).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.optimize import minimize_scalar

from onnx_lowrank.layer import Array, Shape
from onnx_lowrank.linalg import spectrum

ENERGIES = (0.9, 0.95, 0.99)
_GRID = 200
# Singular values below this share of the largest are rounding errors, of the weight as of its decomposition.
_NOTHING = 1e-7


@dataclass(frozen=True)
class Measures:
    """How low the rank of a matrix is, by the measures of the literature; of a stack, over all its matrices.

    Args:
        full_rank: Number of singular values per matrix.
        effective_rank: exp of the entropy of p = sigma / sum(sigma) (Roy and Vetterli, EUSIPCO 2007).
        stable_rank: ||W||_F^2 / ||W||_2^2.
        gini: Gini coefficient of sigma: 0 where all are equal, 1 - 1/n where one is not zero.
        hoyer: (sqrt(n) - ||sigma||_1 / ||sigma||_2) / (sqrt(n) - 1) (Hoyer, JMLR 5, 2004): 0 where all are equal, 1
            where one is not zero.
        nuclear_norm: sum(sigma).
        energy_ranks: Smallest ranks that keep 90, 95 and 99 % of sum(sigma^2).
        evb_rank: Components that EVB tells from noise.
    """

    full_rank: int
    effective_rank: float
    stable_rank: float
    gini: float
    hoyer: float
    nuclear_norm: float
    energy_ranks: tuple[int, ...]
    evb_rank: int

    @staticmethod
    def of(values: Array, shape: tuple[int, int]) -> Measures:
        """Measures of a stack of matrices that are cut at one common rank.

        Args:
            values: Singular values, descending, (groups, min(shape)).
            shape: Of each matrix.
        """
        # What a common rank of r + 1 adds: for a single matrix its singular values.
        pooled = np.sqrt(np.square(values, dtype=np.float64).sum(axis=0))
        return Measures(
            full_rank=len(pooled),
            effective_rank=effective_rank(pooled),
            stable_rank=stable_rank(pooled),
            gini=gini(pooled),
            hoyer=hoyer(pooled),
            nuclear_norm=float(values.sum(dtype=np.float64)),
            energy_ranks=tuple(energy_rank(pooled, share) for share in ENERGIES),
            evb_rank=evb_rank(values, shape),
        )


def effective_rank(values: Array) -> float:
    """exp(-sum p log p) with p = sigma / sum(sigma); 0 for a matrix of zeros."""
    real = values[values > 0]
    if not real.size:
        return 0.0
    shares = real / real.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def stable_rank(values: Array) -> float:
    """sum(sigma^2) / sigma_1^2; 0 for a matrix of zeros."""
    largest = float(values.max(initial=0.0))
    return float(np.square(values / largest).sum()) if largest > 0 else 0.0


def gini(values: Array) -> float:
    """1 - 2 sum_h (sigma_h / sum(sigma)) (n - h + 1/2) / n, sigma ascending (Hurley and Rickard, 2009)."""
    total, count = float(values.sum()), len(values)
    if total <= 0:
        return 0.0
    weights = (count - np.arange(1, count + 1) + 0.5) / count
    return float(1.0 - 2.0 * (np.sort(values) / total * weights).sum())


def hoyer(values: Array) -> float:
    """(sqrt(n) - l1 / l2) / (sqrt(n) - 1); 0 for a matrix of zeros or a single value."""
    l2, root = float(np.linalg.norm(values)), math.sqrt(len(values))
    return (root - float(values.sum()) / l2) / (root - 1.0) if l2 > 0 and root > 1 else 0.0


def energy_rank(values: Array, share: float) -> int:
    """The smallest rank that keeps `share` of sum(sigma^2); 1 for a matrix of zeros."""
    kept = np.cumsum(np.square(values))
    return int(np.searchsorted(kept, (share - 1e-12) * kept[-1])) + 1


def evb_rank(values: Array, shape: tuple[int, int]) -> int:
    """The largest EVB rank of a stack of matrices.

    Args:
        values: Singular values, descending, (groups, min(shape)).
        shape: Of each matrix.
    """
    return max(_evb(np.asarray(sigma, dtype=np.float64), min(shape), max(shape)) for sigma in values)


@dataclass(frozen=True, eq=False)
class Unfolding:
    """A stack of matrices made of a layer's weight, by its singular values.

    Args:
        values: Descending, (groups, min(shape)).
        shape: Of each matrix.
    """

    values: Array
    shape: tuple[int, int]

    @staticmethod
    def of(weight: Array, first_axes: Shape) -> Unfolding:
        """The unfolding whose rank is the number of channels between two stages of a chain.

        Rows are output channels and the spatial axes left to the later stages, columns are input channels and
        `first_axes`, those of the earlier ones.

        Args:
            weight: (groups, out, in, *kernel).
            first_axes: Spatial axes.
        """
        axes = range(weight.ndim - 3)
        rows = [1, *(3 + axis for axis in axes if axis not in first_axes)]
        columns = [2, *(3 + axis for axis in axes if axis in first_axes)]
        height = math.prod(weight.shape[axis] for axis in rows)
        matrix = weight.transpose(0, *rows, *columns).reshape(len(weight), height, -1)
        return Unfolding(spectrum(matrix).values, matrix.shape[1:])

    @property
    def full_rank(self) -> int:
        """The smaller side."""
        return min(self.shape)

    @cached_property
    def evb_rank(self) -> int:
        """See `evb_rank`."""
        return evb_rank(self.values, self.shape)


def _evb(sigma: Array, lines: int, columns: int) -> int:
    """EVB rank of one L x M matrix, L <= M."""
    largest = float(sigma.max(initial=0.0))
    if largest <= 0:
        return 0
    squares = np.square(np.maximum(sigma, _NOTHING * largest))
    alpha = lines / columns
    tau = 2.5129 * math.sqrt(alpha)
    limit = (1 + tau) * (1 + alpha / tau)
    # No more components than this can be kept (the paper's theorem 4), so that the rest bounds the noise from below.
    rest = squares[min(math.ceil(lines / (1 + alpha)), lines) - 1 :]
    low = max(float(rest[0]) / (columns * limit), float(rest.mean()) / columns)
    high = float(squares.sum()) / (lines * columns)
    noise = _least(squares, columns, alpha, limit, min(low, high), high)
    return int(np.count_nonzero(squares > columns * noise * limit))


def _least(squares: Array, columns: int, alpha: float, limit: float, low: float, high: float) -> float:
    """The noise variance of least free energy: it may have several minima, so the best of a grid is refined."""

    def energy(variance: float) -> float:
        return _free_energy(squares / (columns * variance), alpha, limit)

    grid = np.geomspace(low, high, _GRID)
    best = int(np.argmin([energy(float(variance)) for variance in grid]))
    bounds = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, _GRID - 1)])
    if bounds[0] >= bounds[1]:
        return float(grid[best])
    return float(minimize_scalar(energy, bounds=bounds, method="bounded").x)


def _free_energy(x: Array, alpha: float, limit: float) -> float:
    signal, noise = x[x > limit], x[x <= limit]
    lifted = signal - (1 + alpha)
    tau = (lifted + np.sqrt(np.square(lifted) - 4 * alpha)) / 2
    kept = signal - tau + np.log((tau + 1) / signal) + alpha * np.log(tau / alpha + 1)
    return float((noise - np.log(noise)).sum() + kept.sum())
