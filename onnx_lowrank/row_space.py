"""Layers with more inputs than there is memory for moments of, in the coordinates of what their weight sees.

Only the part of an input c in the row space of M (S, n) reaches the outputs. With M M^T = U L U^T and S < n,

    Q = M^T U L^(-1/2)  (n, S),    M = (M Q) Q^T,    M Q = U L^(1/2),    Q^T c = L^(-1/2) U^T (M c):

the layer is the matrix M Q on inputs Q^T c, whose second moment has S^2 entries instead of n^2; Q is never formed. A
chain whose first stage B reads all inputs at once loses nothing by it: the best B lies in that space (the left factor
of a whitened SVD is a basis of outputs, the right one its product with M). A refit is confined to it.

Other chains are fitted to the weight alone. Their errors are taken on a few of the inputs themselves (`SeenInputs`), so
that all formats of a layer are compared by what its outputs lose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from onnx_lowrank.chain import Chain
from onnx_lowrank.decomposition import Decomposition, Factorization, Rank
from onnx_lowrank.layer import Array, LayerShape
from onnx_lowrank.linalg import output_norm

_LEAST = 1e-6  # of the outputs, what varies of them counts as at least: rounding must not be the unit
_SMALLEST = 16 * np.finfo(np.float64).eps  # of L per output, relative to the largest: below it there is rounding only


@dataclass(frozen=True, eq=False)
class RowSpace:
    """The row space of every group of one weight.

    Outputs are scaled to one length before M M^T is decomposed: weak ones span the space as strong ones do.

    Args:
        matrix: M, (g, S, n).
        turn: (g, S, S), Q = M^T turn; zero columns stand for what M does not see.
        weight: M Q, a canonical weight without a kernel, (g, S, S).
    """

    matrix: Array
    turn: Array
    weight: Array

    @staticmethod
    def of(weight: Array) -> RowSpace:
        """That of a canonical weight (g, S, C, *kernel)."""
        matrix = weight.reshape(*weight.shape[:2], -1)
        products = matrix.astype(np.float64) @ matrix.swapaxes(1, 2)
        lengths = np.sqrt(np.einsum("gss->gs", products))
        scale = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0)
        values, basis = np.linalg.eigh(products * scale[:, :, None] * scale[:, None, :])
        seen = values > _SMALLEST * products.shape[1] * values.max(axis=1, keepdims=True, initial=0.0)
        roots = np.sqrt(np.where(seen, values, 0.0))
        inverse = np.divide(1.0, roots, out=np.zeros_like(roots), where=seen)
        turn, weight = scale[:, :, None] * basis, lengths[:, :, None] * basis
        return RowSpace(matrix, turn * inverse[:, None, :], weight * roots[:, None, :])

    @property
    def shape(self) -> LayerShape:
        """Of the matrix that stands for the layer."""
        groups, out, _ = self.weight.shape
        return LayerShape(groups, out, out)

    def seen(self, rows: Array) -> Array:
        """Q^T c of every row, (rows, g, n) -> (rows, g, S), in the rows' own precision."""
        outputs = np.matmul(rows.swapaxes(0, 1), self.matrix.astype(rows.dtype, copy=False).swapaxes(1, 2))
        return np.matmul(outputs, self.turn.astype(rows.dtype)).swapaxes(0, 1)

    def mean(self, seen: Array) -> Array:
        """The part of a mean input that M sees, (g, n), from Q^T E[c], (g, S)."""
        return np.einsum("gs,gsn->gn", np.einsum("gst,gt->gs", self.turn, seen), self.matrix)

    def widened(self, factors: Sequence[Array], chain: Chain) -> tuple[Array, ...]:
        """Factors of the matrix as those of the layer: B Q^T in the place of B.

        Args:
            factors: Stage weights of the chain of the same rank on `shape`.
            chain: The layer's.
        """
        first, *rest = factors
        groups, out, _ = self.turn.shape
        wide = (first.reshape(groups, -1, out) @ self.turn.swapaxes(1, 2)) @ self.matrix
        return tuple(array.reshape(stage.weight) for array, stage in zip((wide, *rest), chain.stages, strict=True))


@dataclass(frozen=True, eq=False)
class SeenInputs:
    """A few inputs of a layer, for chains that its moments say too little of.

        error^2 = sum_c ||(M - M') c||^2 / sum_c ||M (c - m)||^2

    with m the mean of these inputs where a bias takes up what a calibrated chain loses of it, else 0: all formats of a
    layer are compared by the same unit. These chains are given nothing back, and none is fitted to these inputs.

    Args:
        weight: M, canonical, (g, S, C, *kernel).
        rows: c, (rows, g, n), finite.
        centred: Whether a bias takes means up.
    """

    weight: Array
    rows: Array
    centred: bool

    def error(self, dense: Array) -> float:
        """Relative error of the outputs of another weight, M'."""
        lost = float(np.linalg.norm(self._outputs(self.weight.astype(np.float64) - dense)))
        return lost / self._length if self._length > 0 else float(lost > 0)

    @cached_property
    def _length(self) -> float:
        outputs = self._outputs(self.weight)
        whole = float(np.linalg.norm(outputs))
        if not self.centred or len(self.rows) < 2:
            return whole
        return max(float(np.linalg.norm(outputs - outputs.mean(axis=-1, keepdims=True))), _LEAST * whole)

    @cached_property
    def _scaled(self) -> Array:
        """The inputs, (g, n, rows), the largest entry one: squares stay in range."""
        rows = self.rows.astype(np.float64).transpose(1, 2, 0)
        return rows / (float(np.abs(rows).max(initial=0.0)) or 1.0)

    def _outputs(self, weight: Array) -> Array:
        """(g, S, rows), in the unit of the largest input."""
        return weight.reshape(*weight.shape[:2], -1).astype(np.float64, copy=False) @ self._scaled


class InRowSpace(Factorization):
    """A factorization of the matrix that stands for a layer, as one of the layer.

    Args:
        method: The format.
        weight: The layer's, (g, S, C, *kernel).
        gram: Second moment of Q^T c, (g, S, S).
    """

    def __init__(self, method: Decomposition, weight: Array, gram: Array) -> None:
        groups, out, in_, *kernel = weight.shape
        self._method, self._shape = method, LayerShape(groups, out, in_, tuple(kernel))
        self._space, self._gram = RowSpace.of(weight), gram
        ranks = method.ranks(self._shape, 1)
        self._inner = method.factorize(self._space.weight, gram, most=ranks[-1] if ranks else None)

    def error(self, rank: Rank) -> float:
        """That of the matrix."""
        return self._inner.error(rank)

    def spectral_error(self, rank: Rank) -> float:
        """That of the matrix."""
        told = self._inner.spectral_error(rank)
        if told is not None:
            return told
        dense = self._method.chain(self._space.shape, rank).dense(self._inner.factors(rank))
        return output_norm(self._space.weight - dense, self._gram) / self._largest if self._largest > 0 else 0.0

    @cached_property
    def _largest(self) -> float:
        return output_norm(self._space.weight, self._gram)

    def note(self, rank: Rank) -> str:
        """That of the cut in the row space."""
        return self._inner.note(rank)

    def factors(self, rank: Rank) -> tuple[Array, ...]:
        """Those of the matrix, widened."""
        return self._space.widened(self._inner.factors(rank), self._method.chain(self._shape, rank))


def factorized(method: Decomposition, weight: Array, gram: Array | None) -> Factorization:
    """A weight decomposed in the metric of `gram`, which may be that of its row space."""
    if gram is None or gram.shape[-1] == weight[0, 0].size:
        return method.factorize(weight, gram)
    return InRowSpace(method, weight, gram)
