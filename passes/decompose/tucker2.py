"""Tucker-2: a 1x1 convolution C->r1, a kxk convolution r1->r2, a 1x1 convolution r2->S (Kim et al., ICLR 2016).

W = core x_1 U_out x_2 U_in with orthonormal U. HOSVD gives the core once for all ranks: with the full bases
G = U_out^T W U_in the squared error at (r1, r2) is exactly ||W||^2 minus the energy of G's leading (r2, r1) block, a
cumulative sum. The factors of the ranks chosen are improved by a few sweeps of HOOI, which only lowers the error.

Calibrated, U_in spans the best row space of the (S K) x C unfolding for the inputs' second moment averaged over the
kernel, U_out are the eigenvectors of the outputs' second moment M G M^T, and the core is the least-squares solution on
the whole moment, again for all ranks at once.

Weights per group: r1 C + r1 r2 prod k + S r2. The rank is (r1, r2): input side, output side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnx_lowrank.chain import Chain, Stage
from onnx_lowrank.decomposition import Decomposition, Factorization, Rank, aligned, require_counts
from onnx_lowrank.layer import Array, LayerShape
from onnx_lowrank.linalg import leading_subspace
from onnx_lowrank.passes.decompose.whitened import Whitened, arrange, usable


class TuckerCore(Factorization):
    """HOSVD bases and the energy of every leading block of the core.

    Args:
        weight: (g, S, C, K), the kernel flattened.
        kernel: The kernel's shape.
        sweeps: HOOI sweeps when factors are made.
    """

    def __init__(self, weight: Array, kernel: tuple[int, ...], sweeps: int) -> None:
        self._weight, self._kernel, self._sweeps = weight, kernel, sweeps
        _, out, in_, _ = weight.shape
        self._out = subspaces([w.reshape(out, -1) for w in weight])
        self._in = subspaces([w.transpose(1, 0, 2).reshape(in_, -1) for w in weight])
        core = core_of(weight, self._out, self._in)
        self._energy = np.square(core).sum(axis=(0, 3)).cumsum(axis=0).cumsum(axis=1)

    def error(self, rank: Rank) -> float:
        """Relative Frobenius error of truncated HOSVD, exact; HOOI can only improve on it."""
        r_in, r_out = rank
        total = float(self._energy[-1, -1])
        if total <= 0 or (r_out, r_in) == self._energy.shape:
            return 0.0
        return math.sqrt(max(0.0, 1.0 - float(self._energy[r_out - 1, r_in - 1]) / total))

    def factors(self, rank: Rank) -> tuple[Array, ...]:
        """Weights (g, r1, C, 1..), (g, r2, r1, *k), (g, S, r2, 1..)."""
        r_in, r_out = rank
        groups, out, in_, _ = self._weight.shape
        ones = (1,) * len(self._kernel)
        pairs = [self._hooi(g, r_in, r_out) for g in range(groups)]
        u_in, u_out = np.stack([p[0] for p in pairs]), np.stack([p[1] for p in pairs])
        core = core_of(self._weight, u_out, u_in)
        return (
            u_in.swapaxes(1, 2).reshape(groups, r_in, in_, *ones),
            core.reshape(groups, r_out, r_in, *self._kernel),
            u_out.reshape(groups, out, r_out, *ones),
        )

    def _hooi(self, group: int, r_in: int, r_out: int) -> tuple[Array, Array]:
        weight = self._weight[group]
        u_in, u_out = self._in[group][:, :r_in], self._out[group][:, :r_out]
        for _ in range(self._sweeps):
            projected = u_in.T @ weight
            u_out, _ = leading_subspace(projected.reshape(len(u_out), -1), r_out)
            projected = u_out.T @ weight.swapaxes(0, 1)
            u_in, _ = leading_subspace(projected.reshape(len(u_in), -1), r_in)
        return u_in, u_out


class CalibratedCore(Factorization):
    """Both bases nested in their ranks, the core solved in closed form; exact output errors at every pair of ranks.

    Args:
        weight: (g, S, C, K), the kernel flattened.
        groups: Weight and second moment of each group; not kept.
        kernel: The kernel's shape.
        most: Highest ranks solved for: input side, output side.
    """

    def __init__(self, weight: Array, groups: Sequence[Whitened], kernel: tuple[int, ...], most: Rank) -> None:
        self._weight, self._kernel = weight, kernel
        _, out, in_, taps = weight.shape
        bases = [np.linalg.eigh(group.product @ group.weight.T) for group in groups]
        self._out = np.stack([vectors[:, ::-1][:, : most[1]] for _, vectors in bases])
        self._in = np.stack([group.rows(min(in_, out * taps, most[0]))[0] for group in groups])
        self._fits = [group.fit(*pair) for group, *pair in zip(groups, self._in, self._out, strict=True)]
        self._total = sum(group.total for group in groups)
        energy = sum(np.square(fit.explained).reshape(-1, taps, self._out.shape[2]) for fit in self._fits)
        self._explained = np.sum(energy, axis=1).cumsum(axis=0).cumsum(axis=1)

    def error(self, rank: Rank) -> float:
        """Relative output error sqrt(tr(D G D^T) / tr(M G M^T)), exact."""
        r_in, r_out = rank
        if self._total <= 0 or self._full(rank):
            return 0.0
        explained = float(self._explained[min(r_in, len(self._explained)) - 1, r_out - 1])
        return math.sqrt(max(0.0, 1.0 - explained / self._total))

    def factors(self, rank: Rank) -> tuple[Array, ...]:
        """Weights (g, r1, C, 1..), (g, r2, r1, *k), (g, S, r2, 1..)."""
        r_in, r_out = rank
        groups, out, in_, taps = self._weight.shape
        ones = (1,) * len(self._kernel)
        u_in, core = np.zeros((groups, r_in, in_)), np.zeros((groups, r_out, r_in, taps))
        if self._full(rank):
            u_in[:] = np.eye(in_)
            core[:] = (self._out.swapaxes(1, 2) @ self._weight.reshape(groups, out, -1)).reshape(core.shape)
        else:
            count = min(r_in, self._in.shape[1])
            u_in[:, :count] = self._in[:, :count]
            for solved, fit in zip(core, self._fits, strict=True):
                coefficients = fit.solve(count * taps)[:, :r_out]
                solved[:, :count] = coefficients.reshape(count, taps, r_out).transpose(2, 0, 1)
        return (
            u_in.reshape(groups, r_in, in_, *ones),
            core.reshape(groups, r_out, r_in, *self._kernel),
            self._out[:, :, :r_out].reshape(groups, out, r_out, *ones),
        )

    def _full(self, rank: Rank) -> bool:
        return rank[0] >= self._weight.shape[2] and rank[1] >= self._weight.shape[1]


def core_of(weight: Array, u_out: Array, u_in: Array) -> Array:
    """U_out^T W U_in, (g, q, p, K), as two matrix products per group."""
    groups, out, in_, taps = weight.shape
    half = u_out.swapaxes(1, 2) @ weight.reshape(groups, out, in_ * taps)
    half = half.reshape(groups, -1, in_, taps).swapaxes(1, 2).reshape(groups, in_, -1)
    return (u_in.swapaxes(1, 2) @ half).reshape(groups, u_in.shape[2], -1, taps).swapaxes(1, 2)


def subspaces(unfoldings: list[Array]) -> Array:
    """Left singular vectors of every matrix of a list, stacked."""
    return np.stack([leading_subspace(matrix, len(matrix))[0] for matrix in unfoldings])


@dataclass(frozen=True)
class Tucker2(Decomposition):
    """Tucker-2 by HOSVD and HOOI: 1x1 C->r1, kxk r1->r2, 1x1 r2->S."""

    sweeps: int = 3
    name: ClassVar[str] = "tucker2"

    def __post_init__(self) -> None:
        """Refuse a negative number of sweeps."""
        require_counts(sweeps=self.sweeps)

    def refusal(self, shape: LayerShape) -> str | None:
        """Refuse what has no kernel, or a side with one channel."""
        if shape.is_matrix:
            return f"{shape} has no kernel: svd reaches the same error with one stage less"
        if min(shape.out, shape.in_) < 2:
            return f"{shape} has one channel on a side: svd gives the same chain with one stage less"
        return None

    def ranks(self, shape: LayerShape, block: int) -> Sequence[Rank]:
        """Pairs with fewer weights than the dense layer."""
        taps = math.prod(shape.kernel)
        dense = shape.out * shape.in_ * taps
        pairs = [(a, b) for a in aligned(shape.in_ - 1, block) for b in aligned(shape.out - 1, block)]
        return [(a, b) for a, b in pairs if a * shape.in_ + a * b * taps + b * shape.out < dense]

    def chain(self, shape: LayerShape, rank: Rank) -> Chain:
        """Three stages, the middle one carries the kernel."""
        r_in, r_out = rank
        n = len(shape.kernel)
        ones = (1,) * n
        first, middle, last = "uvw"[:n], "hwd"[:n].upper(), "xyz"[:n]
        return Chain(
            method=self.name,
            stages=(
                Stage(shape.groups, r_in, shape.in_, ones),
                Stage(shape.groups, r_out, r_in, shape.kernel, tuple(range(n))),
                Stage(shape.groups, shape.out, r_out, ones),
            ),
            equation=f"gpc{first},gqp{middle},gsq{last}->gsc{middle}",
        )

    def factorize(self, weight: Array, gram: Array | None = None, *, most: Rank | None = None) -> Factorization:
        """HOSVD of every group; in the metric of the outputs if there is a second moment."""
        kernel, flat = weight.shape[3:], weight.reshape(*weight.shape[:3], -1)
        moment = usable(gram)
        if moment is None:
            return TuckerCore(flat.astype(np.float64, copy=False), kernel, self.sweeps)
        index = np.arange(math.prod(weight.shape[2:])).reshape(weight.shape[2], -1)
        return CalibratedCore(flat, arrange(weight, moment, index.T), kernel, most or (flat.shape[2], flat.shape[1]))

    def exact_rank(self, shape: LayerShape) -> Rank:
        """Full rank on both sides."""
        return (shape.in_, shape.out)
