"""Linear algebra on stacks of matrices: spectra, truncated factors, unfoldings. Arrays only.

Spectra come from the eigenvectors of the smaller Gram matrix, which costs a fraction of a full SVD. The singular
vectors so obtained are orthonormal to working precision whatever the spectrum, and the other factor is the projection
of the matrix itself, so that a product at full rank gives the matrix back to rounding error; only singular values
below 1e-8 of the largest one are inexact, and those are never worth a rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnx_lowrank.layer import Array


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
        squares = np.square(self.values, dtype=np.float64)
        total = squares.sum()
        return float(np.sqrt(squares[:, rank:].sum() / total)) if total > 0 else 0.0

    def next_value(self, rank: int) -> float:
        """Largest singular value cut at `rank`, relative to the largest of all: the spectral norm of the error."""
        largest = self.values.max(initial=0.0)
        cut = self.values[:, rank:]
        return float(cut.max() / largest) if cut.size and largest > 0 else 0.0


def spectrum(matrix: Array) -> Spectrum:
    """Singular values and vectors of each matrix of a stack (g, m, n), by the smaller Gram matrix in float64."""
    work = matrix.astype(np.float64, copy=False)
    left = work.shape[1] <= work.shape[2]
    gram = work @ work.transpose(0, 2, 1) if left else work.transpose(0, 2, 1) @ work
    values, vectors = np.linalg.eigh(gram)
    values = np.sqrt(np.clip(values[:, ::-1], 0.0, None))
    return Spectrum(work, values, np.ascontiguousarray(vectors[:, :, ::-1]))


def leading_subspace(matrix: Array, rank: int) -> tuple[Array, Array]:
    """Dominant left singular subspace of one matrix (m, n): orthonormal basis (m, rank) and all m singular values."""
    values, vectors = np.linalg.eigh(matrix @ matrix.T)
    return vectors[:, ::-1][:, :rank], np.sqrt(np.clip(values[::-1], 0.0, None))
