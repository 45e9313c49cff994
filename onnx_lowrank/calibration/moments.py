"""Second moments of what a layer sees and of what it should answer, accumulated block by block.

Sums run over rows c (unfolded inputs) and y (wanted outputs). Blocks are shifted by the first block's mean, multiplied
in their own precision and added up in float64, so that memory does not depend on the number of samples and centring
does not cancel:

    S = sum (c - m)(c - m)^T    with any m, and    sum (c - c_mean)(c - c_mean)^T = S - N d d^T,   d = c_mean - m.

Rows that hold NaN or infinity say nothing and are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from onnx_lowrank.layer import Array

_FAR = 1e15  # what is further from zero than this is squared in float64


LEAST_CHUNK = 1024


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


def output_energy(weight: Array, gram: Array) -> float:
    """tr(M G M^T) over all groups: the energy of a layer's outputs.

    Args:
        weight: (groups, out, in, *kernel).
        gram: G, (groups, n, n).
    """
    matrices = weight.astype(np.float64).reshape(*weight.shape[:2], -1)
    return float(sum(np.vdot(matrix @ moment, matrix) for matrix, moment in zip(matrices, gram, strict=True)))


class Accumulator:
    """Collects the moments of one layer.

    Args:
        groups: Groups of the layer.
        n: Unfolded inputs per group.
        out: Outputs per group; 0 where outputs are not needed.
    """

    def __init__(self, groups: int, n: int, out: int = 0) -> None:
        self._count = self._waiting = 0
        self._pending: list[tuple[Array, Array | None]] = []
        # A product per batch would read and write the whole sum for a few rows.
        self._chunk = max(n // 2, LEAST_CHUNK)
        self._shift, self._y_shift = np.zeros((groups, n)), np.zeros((groups, out))
        self._sum, self._y_sum = np.zeros((groups, n)), np.zeros((groups, out))
        self._square, self._cross = np.zeros((groups, n, n)), np.zeros((groups, out, n))
        self._third, self._fourth = np.zeros((groups, n)), np.zeros(groups)

    def add(self, rows: Array, targets: Array | None = None) -> None:
        """Take in one block.

        Args:
            rows: c, (rows, groups, n).
            targets: y, (rows, groups, out), where the accumulator has outputs.
        """
        self._pending.append((rows, targets))
        self._waiting += len(rows)
        if self._waiting >= self._chunk:
            self._flush()

    def _flush(self) -> None:
        blocks, self._pending, self._waiting = self._pending, [], 0
        if not blocks:
            return
        wanted = [targets for _, targets in blocks if targets is not None]
        self._take(np.concatenate([rows for rows, _ in blocks]), np.concatenate(wanted) if wanted else None)

    def _take(self, rows: Array, targets: Array | None) -> None:
        rows, *rest = _finite(rows) if targets is None else _finite(rows, targets)
        targets = rest[0] if rest else None
        if not len(rows):
            return
        if self._count == 0:
            self._shift = _shift(rows)
            if targets is not None:
                self._y_shift = _shift(targets)
        self._count += len(rows)
        wanted = None if targets is None else targets - self._y_shift.astype(targets.dtype)
        centred = rows - self._shift.astype(rows.dtype)
        self._sum += centred.sum(axis=0, dtype=np.float64)
        norms = np.square(centred).sum(axis=2, dtype=np.float64)
        self._third += np.einsum("rg,rgn->gn", norms, centred)
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
        return self._count + self._waiting

    def moments(self) -> Moments:
        """The moments; the accumulator is used up, its memory becomes theirs.

        Of no rows at all they are those of white noise: what is fitted to them is data-free.
        """
        self._flush()
        cov, cross = self._square, self._cross
        if self._count == 0:
            cov[:] = np.eye(cov.shape[-1])
            return Moments(0, self._shift, cov, self._y_shift, cross, np.zeros(len(cov)))
        drift, y_drift = self._sum / self._count, self._y_sum / self._count
        cov /= self._count
        cross /= self._count
        fourth = self._central_fourth(cov, drift)
        for g, d in enumerate(drift):  # group by group: a stack of outer products is as large as the moments
            cov[g] -= np.outer(d, d)
            cross[g] -= np.outer(y_drift[g], d)
        return Moments(self._count, self._shift + drift, cov, self._y_shift + y_drift, cross, self._spread(cov, fourth))

    def _central_fourth(self, square: Array, drift: Array) -> Array:
        """E ||c - c_mean||^4, (groups,), from sums about the shift, so that it does not depend on the first block."""
        along = np.einsum("gn,gnm,gm->g", drift, square, drift, optimize=True)
        length = np.square(drift).sum(axis=1)
        third = np.einsum("gn,gn->g", drift, self._third) / self._count
        power = np.trace(square, axis1=1, axis2=2)
        return self._fourth / self._count + 4 * (along - third) + 2 * length * power - 3 * length**2

    def _spread(self, cov: Array, fourth: Array) -> Array:
        """beta^2 / delta^2 of Ledoit and Wolf, per group; rows are taken to be independent."""
        size = cov.shape[-1]
        level = np.trace(cov, axis1=1, axis2=2) / size
        square = np.einsum("gnm,gnm->g", cov, cov)
        delta = np.maximum(square - size * level**2, 0.0)
        beta = np.maximum(fourth - square, 0.0) / self._count
        return np.divide(beta, delta, out=(beta > 0).astype(np.float64), where=beta < delta)


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
        rows, answers = _finite(rows, targets)
        self._count += len(rows)
        centred = rows - self._known.mean.astype(rows.dtype)
        wanted = answers - self._known.y_mean.astype(rows.dtype)
        self._sum += wanted.sum(axis=0, dtype=np.float64)
        for g in range(rows.shape[1]):
            self._cross[g] += np.ascontiguousarray(wanted[:, g]).T @ np.ascontiguousarray(centred[:, g])

    def moments(self) -> Moments:
        """The known moments with the new outputs."""
        mean = self._known.y_mean + self._sum / max(self._count, 1)
        return replace(self._known, y_mean=mean, cross=self._cross / max(self._count, 1))


def _finite(*arrays: Array) -> list[Array]:
    """The rows that hold numbers only in every array, in float64 where their squares overflow in less."""
    with np.errstate(over="ignore", invalid="ignore"):
        powers = [np.vdot(array, array) for array in arrays]
    if np.isfinite(powers).all():
        return list(arrays)
    good = np.logical_and.reduce([np.isfinite(array).all(axis=(1, 2)) for array in arrays])
    return [array[good].astype(np.float64) for array in arrays]


def _shift(rows: Array) -> Array:
    """About the mean, exactly representable in the rows' own precision; any shift would do."""
    mean = rows.mean(axis=0, dtype=np.float64).clip(-_FAR, _FAR)
    return mean.astype(rows.dtype).astype(np.float64)
