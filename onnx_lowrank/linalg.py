"""Linear algebra on stacks of matrices: spectra, truncated factors, unfoldings. Arrays only.

Spectra come from the eigenvectors of the smaller Gram matrix, which costs a fraction of a full SVD. The singular
vectors so obtained are orthonormal to working precision whatever the spectrum, and the other factor is the projection
of the matrix itself, so that a product at full rank gives the matrix back to rounding error; only singular values
below 1e-8 of the largest one are inexact, and those are never worth a rank. Where the eigenvalues do not add up to the
matrix's energy, or with their vectors do not give the Gram matrix back, LAPACK's gesvd of the matrix takes their place.

Least squares go through one Cholesky factor of the features' second moment, unpivoted, so that the solution for the
first k features is a leading block of the same factor: one factorization, all ranks.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

import numpy as np
from scipy.linalg import LinAlgError, cholesky, solve_triangular, svd

from onnx_lowrank.layer import Array

_STRIP = 256


@dataclass(frozen=True)
class Spectrum:
    """Singular values and one side's singular vectors of a stack of matrices M, (g, m, n).

    Args:
        matrix: M.
        values: Singular values, descending, (g, min(m, n)).
        vectors: Left singular vectors (g, m, k) if m <= n, else right ones (g, n, k); k = min(m, n).
    """

    matrix: Array
    values: Array
    vectors: Array

    @property
    def left(self) -> bool:
        """Whether `vectors` are left singular vectors."""
        return self.matrix.shape[1] <= self.matrix.shape[2]

    def truncated(self, rank: int) -> tuple[Array, Array]:
        """Best rank-`rank` factors (A, B) of M ~ A B in the Frobenius norm, (g, m, r) and (g, r, n).

        The scale of each component is shared evenly (columns of A and rows of B have the norm sqrt(sigma)), which keeps
        both in range when they are written back in half precision.
        """
        basis = self.vectors[:, :, :rank]
        root = np.sqrt(self.values[:, :rank])
        floor = max(float(np.finfo(root.dtype).tiny), 1e-6 * float(np.sqrt(self.values.max(initial=0.0))))
        root = np.where(root > floor, root, 1.0).astype(basis.dtype)
        if self.left:
            return basis * root[:, None, :], (basis.transpose(0, 2, 1) @ self.matrix) / root[:, :, None]
        return (self.matrix @ basis) / root[:, None, :], basis.transpose(0, 2, 1) * root[:, :, None]

    def tail(self, rank: int) -> float:
        """Frobenius norm of what is cut at `rank`, relative to M; over the whole stack."""
        return tail(self.values, rank)

    def next_value(self, rank: int) -> float:
        """Largest singular value cut at `rank`, relative to the largest of all: the spectral norm of the error."""
        largest = self.values.max(initial=0.0)
        cut = self.values[:, rank:]
        return float(cut.max() / largest) if cut.size and largest > 0 else 0.0


def spectrum(matrix: Array) -> Spectrum:
    """Singular values and vectors of each matrix of a stack (g, m, n), by the smaller Gram matrix in float64."""
    work = matrix.astype(np.float64, copy=False)
    values, vectors = _left_vectors(work if work.shape[1] <= work.shape[2] else work.transpose(0, 2, 1))
    return Spectrum(work, values, np.ascontiguousarray(vectors))


def singular_values(matrix: Array) -> Array:
    """Singular values of each matrix of a stack (g, m, n), descending, (g, min(m, n)): a third of `spectrum`'s time."""
    work = matrix.astype(np.float64, copy=False)
    short = work if work.shape[1] <= work.shape[2] else work.transpose(0, 2, 1)
    with contextlib.suppress(LinAlgError):
        squares = np.linalg.eigvalsh(short @ short.transpose(0, 2, 1))
        if _adds_up(squares, short):
            return np.sqrt(np.clip(squares[:, ::-1], 0.0, None))
    return np.stack([svd(each, compute_uv=False, lapack_driver="gesvd") for each in short])


def tail(values: Array, rank: int) -> float:
    """Root of the sum of squares of singular values (g, k) from `rank` on, relative to that of all."""
    squares = np.square(values, dtype=np.float64)
    total = squares.sum()
    return float(np.sqrt(squares[:, rank:].sum() / total)) if total > 0 else 0.0


def output_norm(weight: Array, gram: Array | None = None) -> float:
    """Spectral norm of the output unfolding M, or of M G^(1/2); the largest of all groups.

    Args:
        weight: (g, S, C, *kernel); M is S x n, n = C prod kernel.
        gram: G, (g, n, n), positive semidefinite.
    """
    matrix = weight.reshape(*weight.shape[:2], -1).astype(np.float64, copy=False)
    product = matrix if gram is None else matrix @ gram
    return float(np.sqrt(np.linalg.eigvalsh(product @ matrix.swapaxes(1, 2)).max(initial=0.0)))


def leading_subspace(matrix: Array, rank: int) -> tuple[Array, Array]:
    """Dominant left singular subspace of one matrix (m, n): orthonormal basis (m, rank) and all m singular values."""
    values, vectors = _left_vectors(matrix[None])
    return vectors[0, :, :rank], values[0]


def _left_vectors(stack: Array) -> tuple[Array, Array]:
    """All m singular values (g, m), descending, zeros included, and left singular vectors (g, m, m) of (g, m, n)."""
    with contextlib.suppress(LinAlgError):
        gram = stack @ stack.swapaxes(1, 2)
        squares, vectors = np.linalg.eigh(gram)
        if _adds_up(squares, stack) and _give_back(squares, vectors, gram):
            return np.sqrt(np.clip(squares[:, ::-1], 0.0, None)), vectors[:, :, ::-1]
    _, rows, columns = stack.shape
    values, vectors = np.zeros(stack.shape[:2]), np.zeros((len(stack), rows, rows))
    for i, each in enumerate(stack):
        vectors[i], values[i, :columns], _ = svd(each, full_matrices=rows > columns, lapack_driver="gesvd")
    return values, vectors


def _adds_up(squares: Array, stack: Array) -> bool:
    """Whether squared singular values add up to each matrix's energy, which those that are not finite do not."""
    energy = np.einsum("gmn,gmn->g", stack, stack)
    return bool((np.abs(squares.sum(axis=1) - energy) <= _tolerance(stack) * energy).all())


def _give_back(squares: Array, vectors: Array, gram: Array) -> bool:
    """Whether V diag(squares) V^T is the Gram matrix, judged by its product with one vector."""
    probe = np.ones((gram.shape[1], 1), gram.dtype)
    again = vectors @ (squares[:, :, None] * (vectors.swapaxes(1, 2) @ probe))
    allowed = _tolerance(gram) * np.linalg.norm(gram, axis=(1, 2)) * math.sqrt(gram.shape[1])
    return bool((np.linalg.norm(again - gram @ probe, axis=(1, 2)) <= allowed).all())


def _tolerance(array: Array) -> float:
    return max(1e-9, 1e3 * float(np.finfo(array.dtype).eps))


def scaled_root(moment: Array, jitter: float = 1e-12) -> tuple[Array, Array]:
    """Lower Cholesky factor of D Z D for a positive semidefinite Z (n, n), and the diagonal of D.

    D scales Z to a unit diagonal; it is 0 where Z's diagonal is rounding error. `jitter` is added to the unit diagonal,
    a hundred times more after each failure: it makes up for rounding errors and for a singular Z.
    """
    diagonal = np.diagonal(moment)
    real = diagonal > 1e-13 * diagonal.max(initial=0.0)
    scale = np.where(real, 1.0 / np.sqrt(np.where(real, diagonal, 1.0)), 0.0)
    scaled = moment * scale[:, None]
    scaled *= scale
    added = 0.0
    while True:
        scaled[np.diag_indices_from(scaled)] += jitter - added
        try:
            return cholesky(scaled, lower=True, check_finite=False), scale
        except LinAlgError:
            if jitter > 1.0:  # no semidefinite matrix gets here: this one is not
                raise
            jitter, added = 100 * jitter, jitter


def whitened_rows(matrix: Array, covariance: Array, count: int) -> tuple[Array, Array]:
    """Nested bases of the row spaces that approximate M (m, n) best in the norm ||E||^2 = tr(E H E^T).

    With the left singular vectors U of M H^(1/2), U_r U_r^T M is the best approximation of rank r (Eckart-Young in the
    metric H), so the rows of U_r^T M span the best row space. For m > n they are V^T H^(T/2) M^T M up to scale. H is
    never inverted: it may be singular.

    Args:
        matrix: M.
        covariance: H, (n, n), positive semidefinite.
        count: Number of rows wanted, at most min(m, n).

    Returns:
        The rows (count, n), of unit length or zero, and all min(m, n) singular values of M H^(1/2), descending.
    """
    if matrix.shape[0] <= matrix.shape[1]:
        values, vectors = np.linalg.eigh(matrix @ covariance @ matrix.T)
        rows = vectors[:, ::-1][:, :count].T @ matrix
    else:
        lower, scale = scaled_root(covariance)
        half = np.divide(lower, scale[:, None], out=np.zeros_like(lower), where=scale[:, None] > 0)
        inner = matrix.T @ matrix
        values, vectors = np.linalg.eigh(half.T @ inner @ half)
        rows = vectors[:, ::-1][:, :count].T @ half.T @ inner
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    real = length > 1e-12 * length.max(initial=0.0)  # what is below is rounding error, not a direction
    rows = np.divide(rows, length, out=np.zeros_like(rows), where=real)
    return rows, np.sqrt(np.clip(values[::-1], 0.0, None))


def placed_moments(rows: Array, gram: Array, outputs: Array) -> tuple[Array, Array, Array]:
    """Second moments of features computed at several positions: T = I x B, without ever forming T.

    Args:
        rows: B, (R, F).
        gram: G over inputs ordered (position, F), (L F, L F).
        outputs: Anything in the dual of the inputs, (q, L F): M G gives P = T (M G)^T.

    Returns:
        T G (L, R, L F), Z = T G T^T and P, (R L, R L) and (R L, q), in the order (feature, position).
    """
    count, inputs = rows.shape
    places = len(gram) // inputs
    half = rows @ gram.reshape(places, inputs, -1)
    moment = (half.reshape(-1, inputs) @ rows.T).reshape(places, count, places, count)
    cross = (outputs.reshape(-1, inputs) @ rows.T).reshape(len(outputs), places, count)
    size = count * places
    return half, moment.transpose(1, 0, 3, 2).reshape(size, size), cross.transpose(2, 1, 0).reshape(size, -1)


class NestedFit:
    """Least squares Y ~ A T for the first k of a sequence of features T, for every k at once.

    With Z = E[T T^T] = L L^T, P = E[T Y^T] and X = L^-1 P, the first k features explain ||X[:k]||^2 of E||Y||^2, and
    their coefficients solve L_k^T A^T = X[:k]. Features are scaled to unit energy; those without any get no weight.

    Args:
        moment: Z, (n, n), positive semidefinite.
        cross: P, (n, outputs).
        jitter: Added to the energy of each feature, relative to it.
    """

    def __init__(self, moment: Array, cross: Array, jitter: float = 1e-12) -> None:
        lower, self._scale = scaled_root(moment, jitter)
        self.explained = solve_triangular(lower, cross * self._scale[:, None], lower=True, check_finite=False)
        # The upper half is empty: rows are kept in strips, up to the diagonal.
        self._strips = [lower[i : i + _STRIP, : i + _STRIP].copy() for i in range(0, len(lower), _STRIP)]

    def solve(self, count: int) -> Array:
        """Coefficients A^T of the first `count` features, (count, outputs)."""
        lower = np.zeros((count, count))
        for i, strip in zip(range(0, count, _STRIP), self._strips, strict=False):
            lower[i : i + _STRIP, : i + _STRIP] = strip[: count - i, :count]
        solution = solve_triangular(lower, self.explained[:count], lower=True, trans="T", check_finite=False)
        return solution * self._scale[:count, None]
