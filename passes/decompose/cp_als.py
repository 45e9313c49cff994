"""Canonical polyadic (CP) decomposition of one tensor: alternating least squares, and what keeps it from degenerating.

    W[s, c, k1, .., kd] ~ sum_r w_r a_r[s] b_r[c] d1_r[k1] .. dd_r[kd],    all vectors of unit length.

The best approximation of rank R need not exist: terms then grow without bound and cancel each other, which costs digits
in float32 and in every later refit. A small ridge in every step of least squares holds most of that back at no cost
(Paatero, J. Chemometrics 2000). What has grown nevertheless is corrected: the error-preserving correction (Phan et al.,
ECCV 2020; arXiv 2008.05441) lowers sum_r w_r^2 as far as a bound on the error allows: for one factor A, the others of
unit length, that is

    min ||A||^2  subject to  ||W_(A) - A K^T|| <= delta,    K the Khatri-Rao product of the others,

solved by A = M (Gamma + lambda I)^-1, M = W_(A) K, Gamma = K^T K, with the one lambda at which the bound is met.
TensorLy's `parafac` is the reference in the tests; at the ranks of interest it takes several times as long,
as it multiplies the tensor by one term at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.linalg import cho_solve
from scipy.optimize import brentq

from onnx_lowrank.contraction import contract
from onnx_lowrank.layer import Array
from onnx_lowrank.linalg import leading_subspace, scaled_root

_SCREENING = 8  # sweeps after which the best start is known
TOLERANCE = 1e-3  # what comes after, the refit or the next rank, starts from here
_XTOL = 1e-3  # of the logarithm of lambda
_CORRECTIONS = 400  # sweeps at most
_SHRINKING = 1e-3  # relative fall of the sum of squares per sweep at which they end
_LARGE = 1 << 15  # entries from which on the tensor is multiplied in float32; what is solved stays in float64
# A factor from W_(A) K, K^T K and the factor as it is.
Step = Callable[[Array, Array, Array], Array]


@dataclass(frozen=True, eq=False)
class Terms:
    """Rank-one terms.

    Args:
        weights: w, (R,).
        factors: One per axis of the tensor, (size, R), columns of unit length (or zero).
    """

    weights: Array
    factors: tuple[Array, ...]

    @property
    def energy(self) -> float:
        """sum_r ||term_r||^2."""
        return float(np.vdot(self.weights, self.weights))

    def dense(self) -> Array:
        """The tensor that the terms add up to."""
        letters = "abcdefg"[: len(self.factors)]
        terms = [(letter + "r", factor) for letter, factor in zip(letters, self.factors, strict=True)]
        sizes = dict(zip(letters, map(len, self.factors), strict=True)) | {"r": len(self.weights)}
        return contract([("r", self.weights), *terms], letters, sizes)

    def widened(self, rank: int, rng: np.random.Generator) -> Terms:
        """More terms, the new ones random and as large as the others are on average."""
        more = rank - len(self.weights)
        fresh = [_unit(rng.standard_normal((len(factor), more)))[0] for factor in self.factors]
        weights = np.full(more, math.sqrt(self.energy / len(self.weights)))
        factors = (np.hstack(pair) for pair in zip(self.factors, fresh, strict=True))
        return Terms(np.concatenate([self.weights, weights]), tuple(factors))


@dataclass(frozen=True, eq=False)
class Problem:
    """One tensor to decompose."""

    tensor: Array

    def __getstate__(self) -> dict[str, Array]:
        """Without what can be made again."""
        return {"tensor": self.tensor}

    @cached_property
    def _turned(self) -> tuple[Array, Array]:
        """The tensor over `_scale`, its second axis last and its first one last, as matrix products want it."""
        work = (self.tensor / self._scale).astype(np.float32 if self.tensor.size >= _LARGE else np.float64)
        return np.ascontiguousarray(np.moveaxis(work, 1, -1)), np.ascontiguousarray(np.moveaxis(work, 0, -1))

    @cached_property
    def _scale(self) -> float:
        return float(np.abs(self.tensor).max()) or 1.0

    @cached_property
    def norm(self) -> float:
        """||W||."""
        return float(np.linalg.norm(self.tensor))

    def error(self, terms: Terms) -> float:
        """||W - sum of terms|| / ||W||."""
        return float(np.linalg.norm(self.tensor - terms.dense())) / self.norm

    def degeneracy(self, terms: Terms) -> float:
        """sum_r ||term_r||^2 / ||W||^2: at most 1 for orthogonal terms, without bound for terms that cancel."""
        return terms.energy / self.norm**2

    def random(self, rank: int, rng: np.random.Generator) -> Terms:
        """A random start."""
        factors = tuple(_unit(rng.standard_normal((size, rank)))[0] for size in self.tensor.shape)
        return Terms(np.ones(rank), factors)

    def spectral(self, rank: int, rng: np.random.Generator) -> Terms:
        """The leading singular vectors of every unfolding, random columns beyond them."""
        factors: list[Array] = []
        for axis, size in enumerate(self.tensor.shape):
            unfolding = np.moveaxis(self.tensor, axis, 0).reshape(size, -1)
            basis, _ = leading_subspace(unfolding, min(rank, size))
            factors.append(np.hstack([basis, _unit(rng.standard_normal((size, rank - basis.shape[1])))[0]]))
        return Terms(np.ones(rank), tuple(factors))

    def als(self, starts: Sequence[Terms], sweeps: int, tolerance: float = TOLERANCE, ridge: float = 0.0) -> Terms:
        """Alternating least squares from the start that is best after a few sweeps.

        Args:
            starts: At least one.
            sweeps: At most.
            tolerance: Relative fall of the error per sweep below which it ends.
            ridge: Added to the unit diagonal of Gamma.
        """

        def step(mttkrp: Array, gamma: Array, factor: Array) -> Array:  # noqa: ARG001 - one of the steps
            lower, scale = scaled_root(gamma + ridge * np.diag(np.diagonal(gamma)))
            return cho_solve((lower, True), (mttkrp * scale).T, check_finite=False).T * scale

        screened = [self._descended(start, min(_SCREENING, sweeps), tolerance, step) for start in starts]
        return self._descended(min(screened, key=lambda entry: entry[1])[0], sweeps - _SCREENING, tolerance, step)[0]

    def _descended(self, terms: Terms, sweeps: int, tolerance: float, step: Step) -> tuple[Terms, float]:
        error = math.inf
        for _ in range(sweeps):
            before, (terms, error) = error, self._sweep(terms, step)
            if before - error < tolerance * before:
                break
        return terms, error

    def corrected(self, terms: Terms, slack: float, calm: float) -> Terms:
        """Terms whose squares add up to less, with an error of at most 1 + `slack` times that of the given ones.

        It is slow at first and may stand almost still on the way: stopping at a fall of 2 % per sweep lost half of it.

        Args:
            terms: Where to start.
            slack: By how much the error may rise, relative to it.
            calm: The degeneracy at which it is good enough.
        """
        bound = max((1 + slack) * self.error(terms), 1e-7) * self.norm

        def step(mttkrp: Array, gamma: Array, factor: Array) -> Array:
            return self._shrunk(mttkrp, gamma, factor, bound)

        for _ in range(_CORRECTIONS):
            before, (terms, _) = terms, self._sweep(terms, step)
            if self.degeneracy(terms) <= calm or terms.energy > (1 - _SHRINKING) * before.energy:
                break
        return terms

    def _shrunk(self, mttkrp: Array, gamma: Array, factor: Array, bound: float) -> Array:
        values, vectors = np.linalg.eigh(gamma)
        values = np.clip(values, 0.0, None)
        rotated = mttkrp @ vectors
        energy = np.square(rotated).sum(axis=0)
        total = self.norm**2

        def excess(log_ridge: float) -> float:
            ridge = math.exp(log_ridge) * values[-1]
            return total - float(np.sum(energy * (values + 2 * ridge) / np.square(values + ridge))) - bound**2

        low, high = math.log(1e-12), math.log(1e6)
        if not values[-1] > 0 or excess(low) > 0 or excess(high) < 0:
            return factor
        ridge = math.exp(float(brentq(excess, low, high, xtol=_XTOL)) - 2 * _XTOL)  # on the side that keeps the bound
        return (rotated / (values + ridge * values[-1])) @ vectors.T

    def _sweep(self, terms: Terms, step: Step) -> tuple[Terms, float]:
        """Every factor replaced in turn, and the relative error after it.

        The tensor is multiplied twice: by the second factor for all axes but the second, by the first for that one.
        """
        weights, factors = terms.weights, list(terms.factors)
        dtype = self._turned[0].dtype
        products = [factor.T @ factor for factor in factors]
        taps_letters = "hijk"[: len(factors) - 2]
        partial = mttkrp = gamma = raw = factors[0]
        for axis in (0, *range(2, len(factors)), 1):
            if axis < 2:
                turned = self._turned[axis]
                rows = turned.reshape(-1, turned.shape[-1]) @ factors[1 - axis].astype(dtype)
                partial = rows.reshape(*turned.shape[:-1], -1)
            letters = ("c" if axis == 1 else "s") + taps_letters
            named = {letters[0]: factors[1 if axis == 1 else 0], **dict(zip(taps_letters, factors[2:], strict=True))}
            sizes = {letter: len(factor) for letter, factor in named.items()} | {"r": len(weights)}
            own = letters[0] if axis < 2 else taps_letters[axis - 2]
            others = [(letter + "r", factor.astype(dtype)) for letter, factor in named.items() if letter != own]
            mttkrp = contract([(letters + "r", partial), *others], own + "r", sizes).astype(np.float64) * self._scale
            gamma = np.prod([product for i, product in enumerate(products) if i != axis], axis=0)
            raw = step(mttkrp, gamma, factors[axis] * weights)
            factors[axis], weights = _unit(raw)
            products[axis] = factors[axis].T @ factors[axis]
        squared = self.norm**2 - 2 * float(np.vdot(mttkrp, raw)) + float(np.vdot(raw @ gamma, raw))
        return Terms(weights, tuple(factors)), math.sqrt(max(squared, 0.0)) / self.norm


def _unit(matrix: Array) -> tuple[Array, Array]:
    """Columns of unit length, and their lengths."""
    length = np.linalg.norm(matrix, axis=0)
    return matrix / np.where(length > 0, length, 1.0), length


def exact_terms(tensor: Array) -> Terms:
    """The tensor as one term for each of its fibres along its longest axis: always exact, of product-of-others rank."""
    longest = int(np.argmax(tensor.shape))
    fibres = np.moveaxis(tensor, longest, 0).reshape(tensor.shape[longest], -1)
    others = [size for axis, size in enumerate(tensor.shape) if axis != longest]
    places = np.indices(others).reshape(len(others), -1)
    factors: list[Array] = [np.eye(size)[:, at] for size, at in zip(others, places, strict=True)]
    columns, weights = _unit(fibres)
    factors.insert(longest, columns)
    return Terms(weights, tuple(factors))
