"""What calibrated decompositions share: one group's weight and second moment, arranged by the stages of a chain.

The first stage sees the input channels at its own kernel positions, F values; the last one sees the first stage's
outputs at L positions. With B the first stage's weights, the features at position l are T_l = B c_l, and the last
stage is the least-squares solution on all T_l at once:

    min_A tr((M - A T) G (M - A T)^T),    Z = T G T^T,  P = T G M^T.

B comes from G averaged over the positions (linalg.whitened_rows), where it is optimal; with L = 1 that is all of G, and
the chain is the best of its form (whitened SVD: Wang et al., SVD-LLM, ICLR 2025).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular

from onnx_lowrank.layer import Array
from onnx_lowrank.linalg import NestedFit, placed_moments, scaled_root, whitened_rows

Positions = NDArray[np.intp]
_RIDGE = 1e-12
_FLOOR = 1e-3


def usable(gram: Array | None) -> Array | None:
    """The second moment in float64 if it says anything, else None: then only the weight itself can be approximated."""
    if gram is None or not np.isfinite(gram).all() or not np.trace(gram, axis1=1, axis2=2).sum() > 0:
        return None
    return gram.astype(np.float64, copy=False)


class Channels:
    """A weight in the metric of its input channels: W R with R R^T = H + f I, H the mean of G over the taps.

    f is a thousandth of the mean of H's diagonal: what is seen too seldom to be trusted must not grow on the way back.

    Args:
        weight: W, (g, S, C, *kernel).
        gram: G, (g, n, n), n in the order (channel, tap).

    Attributes:
        roots: R, lower triangular, (g, C, C).
        weight: W R, shaped as W.
    """

    def __init__(self, weight: Array, gram: Array) -> None:
        groups, out, channels = weight.shape[:3]
        taps = gram.shape[1] // channels
        means = np.einsum("gakbk->gab", gram.reshape(groups, channels, taps, channels, taps)).astype(np.float64) / taps
        floors = _FLOOR * np.trace(means, axis1=1, axis2=2) / channels
        energies = np.clip(np.diagonal(means, axis1=1, axis2=2), 0.0, None)
        each = np.arange(channels)
        means[:, each, each] = energies + np.where(floors > 0, floors, 1.0)[:, None]  # 1: a group without inputs
        self.roots = np.stack([lower / scale[:, None] for lower, scale in map(scaled_root, means)])
        columns = weight.reshape(groups, out, channels, taps)
        self.weight = (self.roots.swapaxes(1, 2)[:, None] @ columns).reshape(weight.shape)

    def into(self, group: int, rows: Array) -> Array:
        """First-stage weights B (.., C) as those of the weight in this metric: B R."""
        return rows @ self.roots[group]

    def back(self, group: int, rows: Array) -> Array:
        """B (R, C) from B R."""
        return solve_triangular(self.roots[group], rows.T, lower=True, trans="T", check_finite=False).T


class Whitened:
    """Weight and second moment of one group, arranged by position of the last stage and input of the first.

    Args:
        weight: M, (S, n).
        gram: G, (n, n).
        order: Index into n of every (position of the last stage, input of the first): (L, F).
        ridge: Added to G's diagonal: an input that never occurred still has a weight worth keeping.
    """

    def __init__(self, weight: Array, gram: Array, order: Positions, ridge: float) -> None:
        flat = order.ravel()
        self.positions, self.inputs = order.shape
        self.weight = weight[:, flat]
        self.gram = gram[np.ix_(flat, flat)]
        self.gram[np.diag_indices_from(self.gram)] += ridge
        self.product = self.weight @ self.gram
        self.total = float(np.vdot(self.product, self.weight))

    def unfolding(self) -> Array:
        """Rows (S, L), columns F."""
        return self.weight.reshape(-1, self.inputs)

    def rows(self, count: int) -> tuple[Array, Array]:
        """First-stage weights B (count, F), nested, and the singular values that their order follows."""
        blocks = self.gram.reshape(self.positions, self.inputs, self.positions, self.inputs)
        return whitened_rows(self.unfolding(), np.einsum("lclk->ck", blocks) / self.positions, count)

    def fit(self, rows: Array, target: Array | None = None) -> NestedFit:
        """The last stage's least squares on B's features, in the order (feature, position).

        Args:
            rows: B, (R, F).
            target: Orthonormal basis (S, q) in which the outputs are wanted, or None for the outputs themselves.
        """
        product = self.product if target is None else target.T @ self.product
        _, moment, cross = placed_moments(rows, self.gram, product)
        return NestedFit(moment, cross)


def arrange(weight: Array, gram: Array, order: Positions) -> list[Whitened]:
    """Every group of a canonical weight with its second moment (groups, n, n)."""
    ridge = _RIDGE * float(np.trace(gram, axis1=1, axis2=2).sum()) / (gram.shape[0] * gram.shape[1])
    matrices = weight.astype(np.float64, copy=False).reshape(*weight.shape[:2], -1)
    return [Whitened(matrix, moment, order, ridge) for matrix, moment in zip(matrices, gram, strict=True)]
