"""Block-term decomposition: 1x1 C->N r1, kxk in N groups r1->r2, 1x1 N r2->S (De Lathauwer 2008; Ye et al., CVPR 2018).

    W = sum_n core_n x_1 B_n x_2 A_n,    A_n (r1, C), core_n (r2, r1, kernel), B_n (S, r2):

a sum of N Tucker-2 blocks, which is one Tucker-2 chain with a core in N groups: with ends as wide, the core has an N-th
of the weights. Fitted by alternating least squares from the bases of one HOSVD, dealt to the blocks as they are and
turned at random: the ends of all blocks are solved for together, the cores one after the other, each step in closed
form. Blocks can grow and cancel as terms of CP do; a fit where they did is not used.

Weights per group: N (r1 C + r1 r2 prod kernel + S r2). The rank is (N, r1, r2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from scipy.linalg import cho_solve

from onnx_lowrank.chain import Chain, Stage
from onnx_lowrank.decomposition import Decomposition, Factorization, Rank, require_counts, spaced
from onnx_lowrank.layer import Array, LayerShape
from onnx_lowrank.linalg import scaled_root
from onnx_lowrank.passes.decompose.mixing import IN_CHANNELS, MixingFit
from onnx_lowrank.passes.decompose.tucker2 import subspaces
from onnx_lowrank.passes.decompose.whitened import Channels

_BLOCKS = (2, 4, 8)
_SKEW = 1.35  # the shares of channels kept at both ends differ by this factor at most
_SCREENING = 8  # sweeps after which the best start is known
_SPARE = 1.5  # as many columns of the bases as the blocks' ends have together, times this
_LAST = 4  # sweeps of the whole weight, at least
LARGE = 1 << 15  # entries from which on single precision pays
_TOLERANCE = 1e-3  # relative fall of the error per sweep at which iterations end
_LIMIT = 10.0  # sum ||block||^2 / ||W||^2 above which a fit is not used


@dataclass(frozen=True, eq=False)
class Blocks:
    """A_n (N, r1, C), core_n (N, r2, r1, K) and B_n (N, S, r2) of one group."""

    first: Array
    cores: Array
    last: Array

    @property
    def parts(self) -> tuple[Array, Array, Array]:
        """All three."""
        return self.first, self.cores, self.last

    @property
    def dense(self) -> Array:
        """The sum of the blocks, (S, C K)."""
        return self.last.transpose(1, 0, 2).reshape(self.last.shape[1], -1) @ self.features

    @property
    def features(self) -> Array:
        """What the blocks' last stages read, (N r2, C K)."""
        return np.einsum("nqpk,npc->nqck", self.cores, self.first, optimize=True).reshape(-1, self._inputs)

    def orthonormal(self) -> Blocks:
        """The same blocks, every A_n with orthonormal rows and B_n with orthonormal columns: nothing cancels inside.

        Rows and columns beyond those of the weight are zero.
        """
        q_in, r_in = np.linalg.qr(self.first.swapaxes(1, 2))
        q_out, r_out = np.linalg.qr(self.last)
        cores = np.einsum("nbq,nqpk,nap->nbak", r_out, self.cores, r_in, optimize=True)
        _, right, left, _ = self.cores.shape
        more_in, more_out = left - q_in.shape[2], right - q_out.shape[2]
        return Blocks(
            np.pad(q_in, [(0, 0), (0, 0), (0, more_in)]).swapaxes(1, 2),
            np.pad(cores, [(0, 0), (0, more_out), (0, more_in), (0, 0)]),
            np.pad(q_out, [(0, 0), (0, 0), (0, more_out)]),
        )

    @property
    def energy(self) -> float:
        """sum_n ||block_n||^2."""
        features = self.features.reshape(len(self.cores), -1, self._inputs)
        outer, inner = self.last.swapaxes(1, 2) @ self.last, features @ features.swapaxes(1, 2)
        return float(np.vdot(outer, inner))

    @property
    def _inputs(self) -> int:
        return self.first.shape[2] * self.cores.shape[3]


class BlockFit(MixingFit):
    """Blocks of every group at the ranks asked for."""

    def __init__(self, method: BlockTerm, weight: Array, gram: Array | None) -> None:
        super().__init__(method, weight, gram)
        self.sweeps, self.restarts = method.sweeps, method.restarts
        groups, out, in_ = weight.shape[:3]
        self._flat = self.weight.reshape(groups, out, in_, -1)
        self._bases = [
            (subspaces([w.transpose(1, 0, 2).reshape(in_, -1)])[0], subspaces([w.reshape(out, -1)])[0])
            for w in self._flat
        ]

    def fit(self, rank: Rank) -> tuple[Array, ...]:
        """Alternating least squares from the bases of one HOSVD."""
        return self._stages(rank, [self._fitted(group, rank) for group in range(len(self._flat))])

    def exact(self) -> tuple[Array, ...]:
        """One block: the weight itself between two identities."""
        groups, out, in_ = self.weight.shape[:3]
        stages = self.method.chain(self.shape, (1, in_, out)).stages
        eyes = (np.broadcast_to(np.eye(size), (groups, size, size)) for size in (in_, out))
        first, last = (eye.reshape(stage.weight) for eye, stage in zip(eyes, (stages[0], stages[-1]), strict=True))
        return first, self.weight.reshape(stages[1].weight), last

    def in_channels(self, rank: Rank, factors: Sequence[Array], channels: Channels) -> tuple[Array, ...]:
        """The blocks of W R after a few sweeps, their first stages taken back."""
        found: list[Blocks] = []
        for group, blocks in enumerate(self._blocks(rank, factors)):
            begun = replace(blocks, first=channels.into(group, blocks.first))
            weight = channels.weight[group].reshape(self._flat.shape[1:])
            swept = _descended(weight, begun, min(IN_CHANNELS, self.sweeps)).blocks
            rows = channels.back(group, swept.first.reshape(-1, swept.first.shape[2]))
            found.append(replace(swept, first=rows.reshape(swept.first.shape)))
        return self._stages(rank, found)

    def usable(self, rank: Rank, factors: Sequence[Array]) -> bool:
        """Whether the blocks do not cancel."""
        energy = sum(blocks.energy for blocks in self._blocks(rank, factors))
        return energy <= _LIMIT * float(np.vdot(self._flat, self._flat))

    def _blocks(self, rank: Rank, factors: Sequence[Array]) -> list[Blocks]:
        """Every group's blocks: what `_stages` has put together, taken apart."""
        count, left, right = rank
        groups, out, in_, taps = self._flat.shape
        parts = zip(
            factors[0].reshape(groups, count, left, in_),
            factors[1].reshape(groups, count, right, left, taps),
            factors[2].reshape(groups, out, count, right).swapaxes(1, 2),
            strict=True,
        )
        return [Blocks(*part) for part in parts]

    def _stages(self, rank: Rank, fitted: Sequence[Blocks]) -> tuple[Array, ...]:
        """Every group's blocks as weights of the chain."""
        parts = (
            np.stack([blocks.first for blocks in fitted]),
            np.stack([blocks.cores for blocks in fitted]),
            np.stack([blocks.last.swapaxes(0, 1) for blocks in fitted]),
        )
        stages = self.method.chain(self.shape, rank).stages
        return tuple(part.reshape(stage.weight) for part, stage in zip(parts, stages, strict=True))

    def _fitted(self, group: int, rank: Rank) -> Blocks:
        """From the start that is best after a few sweeps: bases as they are, or turned at random.

        Sweeps are of the weight in the leading part of both bases, scaled, and in float32 where that is large; those
        that are left when these gain no more, at least the last four, are of the whole weight in float64.
        """
        (count, left, right), weight, rng = rank, self._flat[group], np.random.default_rng(0)
        u_in, u_out = (
            basis[:, : math.ceil(_SPARE * count * size)]
            for basis, size in zip(self._bases[group], (left, right), strict=True)
        )
        core = np.einsum("sck,cp->spk", np.einsum("sck,sq->qck", weight, u_out, optimize=True), u_in, optimize=True)
        scale = float(np.abs(core).max(initial=0.0)) or 1.0
        core = (core / scale).astype(np.float32 if core.size >= LARGE else np.float64)
        last = min(_LAST, self.sweeps)
        screening = min(_SCREENING, self.sweeps - last)
        begun: list[_Descent] = []
        for turned in range(1 + self.restarts):
            v_in = _dealt(np.eye(u_in.shape[1]), count, left, rng, turned=turned > 0).astype(core.dtype)
            v_out = _dealt(np.eye(u_out.shape[1]), count, right, rng, turned=turned > 0).astype(core.dtype)
            blocks = Blocks(v_in.swapaxes(1, 2), np.zeros((count, right, left, weight.shape[2]), core.dtype), v_out)
            begun.append(_descended(core, _with_cores(core, blocks), screening))
        best = min(begun, key=lambda descent: descent.error)
        inside = _descended(core, best.blocks, self.sweeps - screening - last, best.error)
        first, cores, end = (part.astype(np.float64) for part in inside.blocks.parts)
        outside = Blocks(first @ u_in.T, cores, scale * (u_out @ end))
        error = float(np.linalg.norm(weight.reshape(len(weight), -1) - outside.dense))
        return _descended(weight, outside, self.sweeps - screening - inside.sweeps, error).blocks.orthonormal()


@dataclass(frozen=True, eq=False)
class _Descent:
    """Blocks, their error, and how many sweeps led there."""

    blocks: Blocks
    error: float
    sweeps: int


def _descended(weight: Array, blocks: Blocks, most: int, error: float = math.inf) -> _Descent:
    """Alternating least squares, as long as it lowers the error.

    Args:
        weight: (S, C, K).
        blocks: The start.
        most: Sweeps at most.
        error: Of the start, where it is known. What errs more, as the normal equations tell, is not returned: of nearly
            dependent blocks a step may be far off. Below sqrt(64 eps) ||W||, where ||W||^2 less what is explained is
            noise, it ends.
    """
    count, right = blocks.cores.shape[:2]
    energy = float(np.vdot(weight, weight))
    least = math.sqrt(64 * float(np.finfo(weight.dtype).eps) * energy)
    for sweep in range(most):
        if error <= least:
            return _Descent(blocks, error, sweep)
        new = _with_cores(weight, _with_first(weight, blocks))
        features = new.features
        cross = features @ weight.reshape(len(weight), -1).T
        solved = _least_squares(features @ features.T, cross)
        before, left = error, math.sqrt(max(energy - float(np.vdot(solved, cross)), 0.0))
        if not left < before:
            return _Descent(blocks, error, sweep + 1)
        blocks, error = Blocks(new.first, new.cores, solved.reshape(count, right, -1).swapaxes(1, 2)), left
        if error > (1 - _TOLERANCE) * before:
            return _Descent(blocks, error, sweep + 1)
    return _Descent(blocks, error, most)


def _dealt(basis: Array, count: int, rank: int, rng: np.random.Generator, *, turned: bool) -> Array:
    """Columns of a basis dealt to the blocks in turn, (N, size, r); random where there are too few."""
    wanted = basis[:, : count * rank]
    if turned:
        wanted = wanted @ np.linalg.qr(rng.standard_normal((wanted.shape[1],) * 2))[0]
    more = rng.standard_normal((len(basis), count * rank - wanted.shape[1])) / math.sqrt(len(basis))
    return np.hstack([wanted, more]).reshape(len(basis), rank, count).transpose(2, 0, 1)


def _with_first(weight: Array, blocks: Blocks) -> Blocks:
    """All A_n at once: the features are those of the transposed problem."""
    count, _, left, taps = blocks.cores.shape
    features = np.einsum("nqpk,nsq->npsk", blocks.cores, blocks.last, optimize=True).reshape(count * left, -1)
    cross = features @ weight.swapaxes(1, 2).reshape(len(weight) * taps, -1)
    return Blocks(_least_squares(features @ features.T, cross).reshape(count, left, -1), blocks.cores, blocks.last)


def _with_cores(weight: Array, blocks: Blocks) -> Blocks:
    """One core after the other, the others as they are."""
    count, right, left, taps = blocks.cores.shape
    last = blocks.last.transpose(1, 0, 2).reshape(len(weight), -1)
    half = (last.T @ weight.reshape(len(weight), -1)).reshape(count, right, -1, taps)
    outer = (last.T @ last).reshape(count, right, count, right)
    first = blocks.first.reshape(count * left, -1)
    inner = (first @ first.T).reshape(count, left, count, left)
    cores = blocks.cores.copy()
    for n in range(count):
        wanted = np.einsum("qck,pc->qpk", half[n], blocks.first[n], optimize=True)
        for m in (other for other in range(count) if other != n):
            wanted -= np.einsum("qb,bak,ap->qpk", outer[n, :, m], cores[m], inner[m, :, n], optimize=True)
        solved = _least_squares(outer[n, :, n], wanted.reshape(right, -1)).reshape(wanted.shape)
        turned = solved.swapaxes(0, 1).reshape(left, -1)
        cores[n] = _least_squares(inner[n, :, n], turned).reshape(left, right, taps).swapaxes(0, 1)
    return Blocks(blocks.first, cores, blocks.last)


def _least_squares(gram: Array, cross: Array) -> Array:
    lower, scale = scaled_root(gram.astype(np.float64, copy=False))
    return (cho_solve((lower, True), cross * scale[:, None], check_finite=False) * scale[:, None]).astype(cross.dtype)


@dataclass(frozen=True)
class BlockTerm(Decomposition):
    """Block terms: 1x1 C->N r1, kxk N r1->N r2 in N groups, 1x1 N r2->S."""

    restarts: int = 1
    sweeps: int = 40
    name: ClassVar[str] = "block_term"
    on_request: ClassVar[str] = "every rank is fitted by iteration, minutes for wide layers"
    structure: ClassVar[int] = 1
    by_rank: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse negative numbers of starts and sweeps."""
        require_counts(restarts=self.restarts, sweeps=self.sweeps)

    def refusal(self, shape: LayerShape) -> str | None:
        """Refuse what has no kernel, or a side with one channel."""
        if shape.is_matrix:
            return f"{shape} has no kernel: svd reaches the same error with fewer stages"
        if min(shape.out, shape.in_) < 2:
            return f"{shape} has one channel on a side: svd reaches the same error with fewer stages"
        return None

    def ranks(self, shape: LayerShape, block: int) -> Sequence[Rank]:
        """2, 4 and 8 blocks, of ends that keep about the same share of their channels."""
        found: list[Rank] = []
        for count in _BLOCKS:
            for left in spaced(shape.in_ // count, block):
                rights = spaced(shape.out // count, block)
                near = [r for r in rights if 1 / _SKEW <= left * shape.out / (r * shape.in_) <= _SKEW]
                found.extend((count, left, right) for right in near)
        return [rank for rank in found if self.chain(shape, rank).params < shape.params]

    def chain(self, shape: LayerShape, rank: Rank) -> Chain:
        """Three stages, the middle one carries the kernel in N groups."""
        count, left, right = rank
        n, ones = len(shape.kernel), (1,) * len(shape.kernel)
        kernel = "hwd"[:n]
        return Chain(
            method=self.name,
            stages=(
                Stage(shape.groups, count * left, shape.in_, ones),
                Stage(shape.groups * count, right, left, shape.kernel, tuple(range(n))),
                Stage(shape.groups, shape.out, count * right, ones),
            ),
            equation=f"g(np)c{'ABD'[:n]},(gn)qp{kernel},gs(nq){'XYZ'[:n]}->gsc{kernel}",
        )

    def factorize(self, weight: Array, gram: Array | None = None, *, most: Rank | None = None) -> Factorization:  # noqa: ARG002 - a rank is fitted when it is asked for
        """Bases of both ends; ranks are fitted when they are asked for."""
        return BlockFit(self, weight, gram)

    def exact_rank(self, shape: LayerShape) -> Rank:
        """One block at full rank."""
        return (1, shape.in_, shape.out)

    def misfit(self, shape: LayerShape, rank: Rank) -> str | None:
        """Any number of blocks, each of at most full rank."""
        if len(rank) == 3 and min(rank) >= 1 and rank[1] <= shape.in_ and rank[2] <= shape.out:
            return None
        return f"blocks of 1x1 to {shape.in_}x{shape.out}"
