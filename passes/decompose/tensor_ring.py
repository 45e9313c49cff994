"""Tensor ring of a convolution: K[s, c, k] = sum over a, b, e of U[a, s, b] V[b, c, e] Q[e, k, a], k over the kernel.

Zhao et al. (2016); of layers: Wang et al. (CVPR 2018). The chain: 1x1 C -> (b e); kxk e -> a, shared over b; 1x1
(b a) -> S. As b stands in front, a Reshape alone folds it into the batch. The rank is (r1, r2, r3), the sizes of a, b
and e: r1 r2 S + r2 r3 C + r3 r1 prod k weights.

HOSVD bases of as many channels as the ring has inside compress both sides, TensorLy's TR-SVD starts, and alternating
least squares improve. Rings can degenerate like CP: factors grow and cancel. So the sensitivity is looked at, the
energy that noise adds, as a share of K's, where every weight gets its core's mean square as variance:

    E = sum over the cores X of |X|^2 / size(X) n(X) |the other two, contracted|^2 / |K|^2,    n: S, C or prod k.

It is about 3 for orthogonal cores. Bonds are balanced, which changes nothing but it. Above 10 it is brought down while
the error stays within 1 % (Phan et al., ECCV 2020, do so for CP): it is quadratic in each core, so a share of it, grown
step by step, joins the least squares as a ridge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.sparse.linalg import LinearOperator, cg
from tensorly.decomposition import tensor_ring

from onnx_lowrank.chain import Chain
from onnx_lowrank.decomposition import Rank
from onnx_lowrank.layer import Array, LayerShape, Shape
from onnx_lowrank.linalg import leading_subspace
from onnx_lowrank.passes.decompose.network import NO_GROUPS, ON_REQUEST, Link, NetworkFormat, network

_SWEEPS, _STEPS = 3, 3
_CORRECTIONS, _CORRECTION_STEPS = 60, 20
_SHARE, _GROWTH = 1e-3, 1.15
_UNSTABLE = 10.0
_GAIN = 1e-2
_TOLERANCE = 1.01
_EXACT = 1e-10
COPIES = (2, 4)  # sizes of b worth a look
Ring = list[Array]


@dataclass(frozen=True)
class TensorRing(NetworkFormat):
    """Tensor ring: 1x1 C -> r2 r3, kxk r3 -> r1 shared over r2, 1x1 r1 r2 -> S; sensitivity bounded."""

    name: ClassVar[str] = "tensor_ring"
    on_request: ClassVar[str] = ON_REQUEST

    def refusal(self, shape: LayerShape) -> str | None:
        """Refuse what has no kernel, groups, and sides that no ring closes around."""
        if shape.is_matrix:
            return f"{shape} has no kernel: a ring of two cores is an svd"
        if shape.groups > 1:
            return f"{shape} has groups: {NO_GROUPS}"
        if min(shape.out, shape.in_) < 4:
            return f"{shape} has fewer than four channels on a side: tucker2 gives the same chain"
        return None

    def ranks(self, shape: LayerShape, block: int) -> Sequence[Rank]:  # noqa: ARG002 - the product of two ranks is a channel
        """Two or four copies of the kernel's stage, and powers of two for the other two ranks."""
        pairs = [(b, r) for b in COPIES for r in _pairs(shape, b)]
        found = [(a, b, e) for b, (a, e) in pairs]
        return [rank for rank in found if self.saves(shape, rank)]

    def chain(self, shape: LayerShape, rank: Rank) -> Chain:
        """Three stages, the middle one folded."""
        a, b, e = rank
        sizes = {"s": shape.out, "c": shape.in_, "a": a, "b": b, "e": e}
        links = (Link("c", "be"), Link("e", "a", tuple(range(len(shape.kernel)))), Link("ba", "s"))
        return network(self.name, shape, links, "c", "s", sizes)

    def algorithm(self, weight: Array) -> RingAlgorithm:
        """TR-SVD, least squares, sensitivity correction."""
        return RingAlgorithm(weight)

    def misfit(self, shape: LayerShape, rank: Rank) -> str | None:
        """Ranks whose stages have at most as many channels as the sides."""
        if len(rank) == 3 and all(part > 0 for part in rank):
            a, b, e = rank
            if a * b <= min(shape.out, shape.inputs) and b * e <= shape.in_:
                return None
        most = min(shape.out, shape.inputs)
        return f"three ranks, the first two at most {most} as a product, the last two at most {shape.in_}"


class RingAlgorithm:
    """Rings of one weight.

    Args:
        weight: (1, S, C, *kernel).
    """

    def __init__(self, weight: Array) -> None:
        self._rings = Rings(weight[0].reshape(*weight.shape[1:3], -1))
        self._kernel = weight.shape[3:]

    def __call__(self, rank: Rank) -> tuple[Array, ...]:
        """V (1, b, e, C, 1..), Q (1, a, e, *k), U (1, S, b, a, 1..)."""
        u, v, q = self._rings(rank)
        ones = (1,) * len(self._kernel)
        return (
            v.transpose(0, 2, 1).reshape(1, rank[1], rank[2], -1, *ones),
            q.transpose(2, 0, 1).reshape(1, rank[0], rank[2], *self._kernel),
            u.transpose(1, 2, 0).reshape(1, -1, rank[1], rank[0], *ones),
        )


class Rings:
    """Stable rings of a tensor (S, C, K), their sides compressed by bases made once."""

    def __init__(self, tensor: Array) -> None:
        self._tensor = tensor
        unfolded = tensor.reshape(len(tensor), -1), tensor.swapaxes(0, 1).reshape(tensor.shape[1], -1)
        self._bases = [leading_subspace(matrix, len(matrix))[0] for matrix in unfolded]

    def __call__(self, rank: Rank) -> Ring:
        """U (a, S, b), V (b, C, e), Q (e, K, a); a b at most S and C K, b e at most C."""
        a, b, e = rank
        wide = max(b * e, -(-a * b // self._tensor.shape[2]))  # TR-SVD cuts the rest of a side to a b
        left, right = self._bases[0][:, : a * b], self._bases[1][:, :wide]
        u, v, q = ring(_contract("sck,sx,cy->xyk", self._tensor, left, right), rank)
        return [np.einsum("sx,axb->asb", left, u), np.einsum("cy,bye->bce", right, v), q]


def ring(tensor: Array, rank: Rank) -> Ring:
    """A stable ring of a tensor, as in `Rings`."""
    a, b, e = rank
    found = [np.asarray(core) for core in tensor_ring(tensor, rank=[a, b, e, a]).factors]
    wanted = [(a, tensor.shape[0], b), (b, tensor.shape[1], e), (e, tensor.shape[2], a)]
    cores = [
        np.pad(core, [(0, more - have) for have, more in zip(core.shape, shape, strict=True)])
        for core, shape in zip(found, wanted, strict=True)
    ]
    before = _error(tensor, cores)
    if before <= _EXACT:
        return cores
    for _ in range(_SWEEPS):
        after = _error(tensor, better := _sweep(tensor, cores, 0.0, _STEPS))
        if not after < before:
            break
        cores, before, gained = better, after, before - after
        if gained < _GAIN * after:
            break
    return stabilised(tensor, cores)


def sensitivity(cores: Sequence[Array]) -> float:
    """E of a ring (see above); infinite where its cores cancel to nothing."""
    energy = 0.0
    for i, core in enumerate(cores):
        after, before = cores[i - 2], cores[i - 1]  # contracted over the bond between the two, by their Gram matrices
        ahead = np.einsum("ijk,ijl->kl", after, after, optimize=True)
        others = float(np.vdot(ahead, np.einsum("kij,lij->kl", before, before, optimize=True)))
        energy += core.shape[1] * _variance(core) * others
    whole = float(np.square(_product(cores)).sum())
    return energy / whole if whole > 0 else math.inf


def balanced(cores: Sequence[Array]) -> Ring:
    """The same tensor from cores that share each bond evenly: both sides have the same, diagonal Gram matrix there.

    What stands between the two cores of a bond, R_x R_y^T of their QR factors, is written as U s V^T, and each gets the
    root of s. Any basis of a bond gives the same tensor: this takes away the growth that is nothing but a bad basis.
    """
    found = list(cores)
    for i in (0, 1, 2, 0, 1, 2):
        x, y = found[i], found[(i + 1) % 3]
        left, r_x = np.linalg.qr(x.reshape(-1, x.shape[2]))
        right, r_y = np.linalg.qr(y.reshape(len(y), -1).T)
        u, s, v = np.linalg.svd(r_x @ r_y.T)
        root, bond = np.sqrt(s), x.shape[2]
        new_x, new_y = np.zeros((left.shape[0], bond)), np.zeros((bond, right.shape[0]))
        new_x[:, : len(s)] = (left @ u[:, : len(s)]) * root
        new_y[: len(s)] = root[:, None] * (v[: len(s)] @ right.T)
        found[i], found[(i + 1) % 3] = new_x.reshape(x.shape), new_y.reshape(y.shape)
    return found


def stabilised(tensor: Array, cores: Sequence[Array]) -> Ring:
    """A balanced ring whose sensitivity is not above 10, or the lowest that is found at 1 % more error."""
    best = balanced(cores)
    lowest, error = sensitivity(best), _error(tensor, best)
    share = _SHARE * error * error  # of the tensor's energy, spent on the penalty
    for _ in range(_CORRECTIONS):
        if lowest <= _UNSTABLE:
            break
        cores = _sweep(tensor, best, share / lowest, _CORRECTION_STEPS)
        now = sensitivity(cores)
        if now < lowest and _error(tensor, cores) <= _TOLERANCE * error:
            best, lowest = cores, now
        share *= _GROWTH
    return best


def _sweep(tensor: Array, cores: Sequence[Array], ridge: float, steps: int) -> Ring:
    """Steps of conjugate gradients on each core in turn, with `ridge` times the energy of noise as a penalty."""
    cores = list(cores)
    for i in range(3):
        core, after, before = cores[i], cores[(i + 1) % 3], cores[(i + 2) % 3]  # in the order of the ring
        behind = np.einsum("jcm,kcm->jk", after, after, optimize=True) * (ridge * before.shape[1] * _variance(before))
        ahead = np.einsum("mdi,mdk->ik", before, before, optimize=True) * (ridge * after.shape[1] * _variance(after))
        normal = _Normal(core.shape, after, before, behind, ahead)
        operator = LinearOperator((core.size, core.size), matvec=normal, dtype=np.float64)
        wanted = normal.seen(tensor.transpose(i, (i + 1) % 3, (i + 2) % 3))
        cores[i] = cg(operator, wanted.ravel(), x0=core.ravel(), maxiter=steps)[0].reshape(core.shape)
    return cores


@dataclass(frozen=True, eq=False)
class _Normal:
    """The normal equations of one core (left, n, right), as a function of the core laid out flat.

    Args:
        shape: Of the core.
        after: The core behind it, (right, c, m).
        before: The core in front of it, (m, d, left).
        behind: Penalty on the right bond.
        ahead: Penalty on the left bond.
    """

    shape: Shape
    after: Array
    before: Array
    behind: Array
    ahead: Array

    def __call__(self, x: Array) -> Array:
        step = x.reshape(self.shape)
        penalty = step @ self.behind + np.einsum("ik,knj->inj", self.ahead, step, optimize=True)
        return (self.seen(_contract("inj,jcm,mdi->ncd", step, self.after, self.before)) + penalty).ravel()

    def seen(self, dense: Array) -> Array:
        """The adjoint: a tensor (n, c, d) as the core sees it."""
        return _contract("ncd,jcm,mdi->inj", dense, self.after, self.before)


def _contract(equation: str, *operands: Array) -> Array:
    """Einsum in the order of least work: the greedy one may form what is larger than the tensor."""
    return np.einsum(equation, *operands, optimize="optimal")


def _variance(core: Array) -> float:
    return float(np.square(core).sum()) / core.size


def octaves(limit: int, step: int = 1, spread: int = 8) -> list[int]:
    """Powers of two times `step` up to `limit`, none below 1/`spread` of it: for formats of several ranks."""
    found = [step << power for power in range(limit.bit_length()) if step << power <= limit]
    return [rank for rank in found if rank * spread >= limit]


def _product(cores: Sequence[Array]) -> Array:
    u, v, q = cores
    return _contract("asb,bce,eka->sck", u, v, q)


def _error(tensor: Array, cores: Sequence[Array]) -> float:
    length = float(np.linalg.norm(tensor))
    return float(np.linalg.norm(tensor - _product(cores))) / length if length > 0 else 0.0


def _pairs(shape: LayerShape, b: int) -> list[tuple[int, int]]:
    """Ranks of a and e for b copies."""
    return [(a, e) for a in octaves(min(shape.out, shape.inputs) // b) for e in octaves(shape.in_ // b)]
