"""Tensor ring of a convolution: K[s, c, k] = sum over a, b, e of U[a, s, b] V[b, c, e] Q[e, k, a], k over the kernel.

Zhao et al. (2016); of layers: Wang et al. (CVPR 2018). The chain: 1x1 C -> (b e); kxk e -> a, shared over b; 1x1
(b a) -> S. As b stands in front, a Reshape alone folds it into the batch. The rank is (r1, r2, r3), the sizes of a, b
and e: r1 r2 S + r2 r3 C + r3 r1 prod k weights.

TensorLy's TR-SVD starts, alternating least squares improve. Rings are unstable like CP: factors grow and cancel. So the
sensitivity, the energy that noise of unit variance on all weights would add to K,

    E = S |V Q|^2 + C |Q U|^2 + prod k |U V|^2    (|V Q|: Frobenius norm of the two contracted over what they share),

is brought down afterwards, while the error stays within 1 % (Phan et al., ECCV 2020, for CP): E is quadratic in each
factor, so a share of it, grown step by step, joins the least squares as a ridge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.sparse.linalg import LinearOperator, cg
from tensorly.decomposition import tensor_ring

from onnx_lowrank.chain import Chain
from onnx_lowrank.decomposition import Rank
from onnx_lowrank.layer import Array, LayerShape, Shape
from onnx_lowrank.passes.decompose.network import ON_REQUEST, Link, NetworkFormat, network

_SWEEPS, _CORRECTIONS, _STEPS = 4, 8, 3
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
            return f"{shape} has groups: their channels cannot be folded into the batch"
        if min(shape.out, shape.in_) < 4:
            return f"{shape} has fewer than four channels on a side: tucker2 gives the same chain"
        return None

    def ranks(self, shape: LayerShape, block: int) -> Sequence[Rank]:  # noqa: ARG002 - the product of two ranks is a channel
        """Two or four copies of the kernel's stage, and powers of two for the other two, with fewer weights."""
        pairs = [(b, r) for b in COPIES for r in _pairs(shape, b)]
        found = [(a, b, e) for b, (a, e) in pairs]
        return [rank for rank in found if self.chain(shape, rank).params < shape.params]

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
        self._tensor = weight[0].reshape(*weight.shape[1:3], -1)
        self._kernel = weight.shape[3:]

    def __call__(self, rank: Rank) -> tuple[Array, ...]:
        """V (1, b, e, C, 1..), Q (1, a, e, *k), U (1, S, b, a, 1..)."""
        u, v, q = ring(self._tensor, rank)
        ones = (1,) * len(self._kernel)
        return (
            v.transpose(0, 2, 1).reshape(1, rank[1], rank[2], -1, *ones),
            q.transpose(2, 0, 1).reshape(1, rank[0], rank[2], *self._kernel),
            u.transpose(1, 2, 0).reshape(1, -1, rank[1], rank[0], *ones),
        )


def ring(tensor: Array, rank: Rank) -> Ring:
    """A stable ring U (a, S, b), V (b, C, e), Q (e, K, a) of a tensor (S, C, K); a b is at most S and C K."""
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
        after = _error(tensor, better := _sweep(tensor, cores, 0.0))
        if not after < before * (1 - _GAIN):
            break
        cores, before = better, after
    return _corrected(tensor, cores, before)


def sensitivity(cores: Sequence[Array]) -> float:
    """E of a ring (see above), relative to the energy of what it stands for."""
    energy = sum(
        core.shape[1] * float(np.square(np.einsum("ijk,klm->ijlm", cores[i - 2], cores[i - 1], optimize=True)).sum())
        for i, core in enumerate(cores)
    )
    whole = float(np.square(_product(cores)).sum())
    return energy / whole if whole > 0 else 0.0


def _corrected(tensor: Array, cores: Ring, error: float) -> Ring:
    """The ring of least sensitivity on the way of a growing ridge that errs at most 1 % more."""
    best, lowest = cores, sensitivity(cores)
    share = 1e-6 * error * error
    for _ in range(_CORRECTIONS):
        cores = _sweep(tensor, cores, share / max(sensitivity(cores), 1e-300))
        if _error(tensor, cores) > _TOLERANCE * error:
            break
        if (now := sensitivity(cores)) < lowest:
            best, lowest = cores, now
        share *= 4
    return best


def _sweep(tensor: Array, cores: Ring, ridge: float) -> Ring:
    """A few steps of conjugate gradients on each factor in turn, with `ridge` times the sensitivity as a penalty."""
    cores = list(cores)
    for i in range(3):
        core, after, before = cores[i], cores[(i + 1) % 3], cores[(i + 2) % 3]  # in the order of the ring
        turned = tensor.transpose(i, (i + 1) % 3, (i + 2) % 3)
        behind = ridge * before.shape[1] * np.einsum("jcm,kcm->jk", after, after, optimize=True)
        ahead = ridge * after.shape[1] * np.einsum("mdi,mdk->ik", before, before, optimize=True)

        def seen(dense: Array, after: Array = after, before: Array = before) -> Array:
            return np.einsum("ncd,jcm,mdi->inj", dense, after, before, optimize=True)

        def normal(
            x: Array,
            shape: Shape = core.shape,
            after: Array = after,
            before: Array = before,
            behind: Array = behind,
            ahead: Array = ahead,
        ) -> Array:
            step = x.reshape(shape)
            dense = np.einsum("inj,jcm,mdi->ncd", step, after, before, optimize=True)
            penalty = step @ behind + np.einsum("ik,knj->inj", ahead, step, optimize=True)
            return (seen(dense, after, before) + penalty).ravel()

        operator = LinearOperator((core.size, core.size), matvec=normal, dtype=np.float64)
        solved, _ = cg(operator, seen(turned).ravel(), x0=core.ravel(), maxiter=_STEPS)
        cores[i] = solved.reshape(core.shape)
    return cores


def octaves(limit: int, step: int = 1, spread: int = 8) -> list[int]:
    """Powers of two times `step` up to `limit`, none below 1/`spread` of it: for formats of several ranks."""
    found = [step << power for power in range(limit.bit_length()) if step << power <= limit]
    return [rank for rank in found if rank * spread >= limit]


def _product(cores: Sequence[Array]) -> Array:
    u, v, q = cores
    return np.einsum("asb,bce,eka->sck", u, v, q, optimize=True)


def _error(tensor: Array, cores: Sequence[Array]) -> float:
    length = float(np.linalg.norm(tensor))
    return float(np.linalg.norm(tensor - _product(cores))) / length if length > 0 else 0.0


def _pairs(shape: LayerShape, b: int) -> list[tuple[int, int]]:
    """Ranks of a and e for b copies."""
    return [(a, e) for a in octaves(min(shape.out, shape.inputs) // b) for e in octaves(shape.in_ // b)]
