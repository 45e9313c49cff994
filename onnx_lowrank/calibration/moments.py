"""Second moments of what a layer sees and of what it should answer, accumulated block by block.

Sums run over rows c (unfolded inputs) and y (wanted outputs). Blocks are shifted by the first block's mean, multiplied
in their own precision and added up in float64, so that memory does not depend on the number of samples and centring
does not cancel:

    S = sum (c - m)(c - m)^T    with any m, and    sum (c - c_mean)(c - c_mean)^T = S - N d d^T,   d = c_mean - m.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from onnx_lowrank.layer import Array


@dataclass(frozen=True, eq=False)
class Moments:
    """Means and central moments, per row, group by group.

    Args:
        count: Rows seen.
        mean: E[c], (groups, n).
        cov: E[(c - mean)(c - mean)^T], (groups, n, n).
        y_mean: E[y], (groups, out); empty where no outputs were given.
        cross: E[(y - y_mean)(c - mean)^T], (groups, out, n).
        spread: Estimated relative noise of `cov`: what Ledoit and Wolf (2004) call beta^2 / delta^2, at most 1.
    """

    count: int
    mean: Array
    cov: Array
    y_mean: Array
    cross: Array
    spread: Array

    def gram(self, *, centred: bool) -> Array:
        """E[c c^T], about the mean where a bias can take it up, else about zero."""
        return self.cov if centred else self.cov + self.mean[:, :, None] * self.mean[:, None, :]

    def shrunk(self, *, centred: bool, least: float = 1e-6) -> Array:
        """The Gram matrix pulled towards a multiple of the identity by the share of it that is noise.

            G' = (1 - rho) G + rho (tr G / n) I,    rho = max(spread, least)

        (Ledoit and Wolf 2004). It is positive definite unless nothing was seen but zeros.
        """
        gram = self.gram(centred=centred)
        size = gram.shape[-1]
        level = np.trace(gram, axis1=1, axis2=2) / size
        rho = np.clip(self.spread, least, 1.0)
        result = gram * (1 - rho)[:, None, None]
        index = np.arange(size)
        result[:, index, index] += (rho * np.where(level > 0, level, 1.0))[:, None]
        return result

    def target(self, *, centred: bool) -> Array:
        """E[y c^T], (groups, out, n), about the means or about zero."""
        return self.cross if centred else self.cross + self.y_mean[:, :, None] * self.mean[:, None, :]


class Accumulator:
    """Collects the moments of one layer.

    Args:
        groups: Groups of the layer.
        n: Unfolded inputs per group.
        out: Outputs per group; 0 where outputs are not needed.
    """

    def __init__(self, groups: int, n: int, out: int = 0) -> None:
        self._count = 0
        self._shift, self._y_shift = np.zeros((groups, n)), np.zeros((groups, out))
        self._sum, self._y_sum = np.zeros((groups, n)), np.zeros((groups, out))
        self._square, self._cross = np.zeros((groups, n, n)), np.zeros((groups, out, n))
        self._fourth = np.zeros(groups)

    def add(self, rows: Array, targets: Array | None = None) -> None:
        """Take in one block.

        Args:
            rows: c, (rows, groups, n).
            targets: y, (rows, groups, out), where the accumulator has outputs.
        """
        if not len(rows):
            return
        if self._count == 0:
            self._shift = rows.mean(axis=0, dtype=np.float64)
            if targets is not None:
                self._y_shift = targets.mean(axis=0, dtype=np.float64)
        self._count += len(rows)
        wanted = None if targets is None else targets - self._y_shift.astype(targets.dtype)
        centred = rows - self._shift.astype(rows.dtype)
        self._sum += centred.sum(axis=0, dtype=np.float64)
        norms = np.square(centred).sum(axis=2, dtype=np.float64)
        self._fourth += np.square(norms).sum(axis=0)
        for g in range(rows.shape[1]):
            block = np.ascontiguousarray(centred[:, g])
            self._square[g] += block.T @ block
            if wanted is not None:
                answers = np.ascontiguousarray(wanted[:, g])
                self._cross[g] += answers.T @ block
        if wanted is not None:
            self._y_sum += wanted.sum(axis=0, dtype=np.float64)

    @property
    def count(self) -> int:
        """Rows seen so far."""
        return self._count

    def moments(self) -> Moments:
        """The moments; the accumulator is used up, its memory becomes theirs.

        Raises:
            ValueError: if no row was seen.
        """
        if self._count == 0:
            raise ValueError("got no rows; expected at least one")
        drift, y_drift = self._sum / self._count, self._y_sum / self._count
        cov, cross = self._square, self._cross
        cov /= self._count
        cross /= self._count
        cov -= drift[:, :, None] * drift[:, None, :]
        cross -= y_drift[:, :, None] * drift[:, None, :]
        return Moments(self._count, self._shift + drift, cov, self._y_shift + y_drift, cross, self._spread(cov))

    def _spread(self, cov: Array) -> Array:
        """beta^2 / delta^2 of Ledoit and Wolf, per group; rows are taken to be independent."""
        size = cov.shape[-1]
        level = np.trace(cov, axis1=1, axis2=2) / size
        square = np.einsum("gnm,gnm->g", cov, cov)
        delta = np.maximum(square - size * level**2, np.finfo(np.float64).tiny)
        beta = np.maximum(self._fourth / self._count - square, 0.0) / self._count
        return np.minimum(beta / delta, 1.0)


class CrossAccumulator:
    """Collects moments with other outputs for inputs whose own moments are known.

    Args:
        known: Moments of the same rows.
    """

    def __init__(self, known: Moments) -> None:
        self._known, self._count = known, 0
        self._sum, self._cross = np.zeros_like(known.y_mean), np.zeros_like(known.cross)

    def add(self, rows: Array, targets: Array) -> None:
        """Take in one block, as `Accumulator.add` does."""
        self._count += len(rows)
        centred = rows - self._known.mean.astype(rows.dtype)
        wanted = targets - self._known.y_mean.astype(targets.dtype)
        self._sum += wanted.sum(axis=0, dtype=np.float64)
        for g in range(rows.shape[1]):
            self._cross[g] += np.ascontiguousarray(wanted[:, g]).T @ np.ascontiguousarray(centred[:, g])

    def moments(self) -> Moments:
        """The known moments with the new outputs."""
        mean = self._known.y_mean + self._sum / max(self._count, 1)
        return replace(self._known, y_mean=mean, cross=self._cross / max(self._count, 1))
