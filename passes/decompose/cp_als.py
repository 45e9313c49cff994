"""Canonical polyadic (CP) decomposition of one tensor: alternating least squares, and what keeps it from degenerating.

    W[s, c, k1, .., kd] ~ sum_r w_r a_r[s] b_r[c] d1_r[k1] .. dd_r[kd],    all vectors of unit length.

The best approximation of rank R need not exist: terms then grow without bound and cancel each other, which costs digits
in float32 and in every later refit. The error-preserving correction (Phan et al., ECCV 2020; arXiv 2008.05441) lowers
sum_r w_r^2 as far as a bound on the error allows: for one factor A, the others of unit length, that is

    min ||A||^2  subject to  ||W_(A) - A K^T|| <= delta,    K the Khatri-Rao product of the others,

solved by A = M (Gamma + lambda I)^-1, M = W_(A) K, Gamma = K^T K, with the one lambda at which the bound is met.
TensorLy's `parafac` is the reference in the tests; at the ranks of interest it takes several times as long,
as it multiplies the tensor by one term at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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

    @property
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

    def als(self, starts: Sequence[Terms], sweeps: int, tolerance: float = TOLERANCE) -> Terms:
        """Alternating least squares from the start that is best after a few sweeps.

        Args:
            starts: At least one.
            sweeps: At most.
            tolerance: Relative fall of the error per sweep below which it ends.
        """
        screened = [self._descended(start, min(_SCREENING, sweeps), tolerance) for start in starts]
        return self._descended(min(screened, key=lambda entry: entry[1])[0], sweeps - _SCREENING, tolerance)[0]

    def _descended(self, terms: Terms, sweeps: int, tolerance: float) -> tuple[Terms, float]:
        error = math.inf
        for _ in range(sweeps):
            before, (terms, error) = error, self._sweep(terms, _least_squares)
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
        first, second, *taps = terms.factors
        taps_letters = "hijk"[: len(taps)]
        weights, factors = terms.weights, [first, second, *taps]
        partial = np.tensordot(self.tensor, second, (1, 0))
        order = [0, *range(2, len(factors)), 1]
        mttkrp = gamma = raw = first
        for axis in order:
            if axis == 1:
                partial = np.tensordot(self.tensor, factors[0], (0, 0))
            near = 1 if axis == 1 else 0
            letters = ("c" if axis == 1 else "s") + taps_letters
            own = letters[0] if axis < 2 else taps_letters[axis - 2]
            others = [(letters[0], factors[near])] if axis >= 2 else []
            others += [(taps_letters[i - 2], factors[i]) for i in range(2, len(factors)) if i != axis]
            sizes = {letters[0]: len(factors[near]), "r": len(weights)}
            sizes |= {letter: len(tap) for letter, tap in zip(taps_letters, factors[2:], strict=True)}
            named = [(letters + "r", partial), *((letter + "r", factor) for letter, factor in others)]
            mttkrp = contract(named, own + "r", sizes)
            gamma = np.ones((len(weights), len(weights)))
            for i, factor in enumerate(factors):
                if i != axis:
                    gamma = gamma * (factor.T @ factor)
            raw = step(mttkrp, gamma, factors[axis] * weights)
            factors[axis], weights = _unit(raw)
        squared = self.norm**2 - 2 * float(np.vdot(mttkrp, raw)) + float(np.vdot(raw @ gamma, raw))
        return Terms(weights, tuple(factors)), math.sqrt(max(squared, 0.0)) / self.norm


def _least_squares(mttkrp: Array, gamma: Array, factor: Array) -> Array:  # noqa: ARG001 - one of the steps
    lower, scale = scaled_root(gamma)
    return cho_solve((lower, True), (mttkrp * scale).T, check_finite=False).T * scale


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
