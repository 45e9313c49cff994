"""Semi-tensor products (Zhao et al., 2021): outer factors of C/t x r/t weights that act as A (x) I_t.

    Y[m, (q - 1) t + n] = sum over p of X[m, (p - 1) t + n] A[p, q]:  a small product, shared over n.

Channels are cut into (c, n), n = 1 .. t. Three networks have such factors at both ends: Tucker, tensor train and tensor
ring. In each the outer factors are those of the same network of the weight as a tensor [s, c, (m, n, kernel)] with
fewer, larger slices, so that their algorithms are at hand. Sizes of bonds count all t copies: a multiple of t.

Tucker:  C/t -> r1/t, core r1 -> r2, r2/t -> S/t:               C r1 / t^2 + r1 r2 prod k + S r2 / t^2 weights
train:   the core in two stages, r1 -> r with the first spatial axis, r -> r2 with the others:    r (r1 k_1 + r2 k_2 ..)
ring:    C/t -> r2 r3/t, kernel r3 -> r1 shared over r2, r1/t r2 -> S/t:  r2 (C r3 + S r1) / t^2 + r3 r1 prod k
"""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnx_lowrank.chain import Chain
from onnx_lowrank.decomposition import Rank, halves, split_axis
from onnx_lowrank.layer import Array, LayerShape
from onnx_lowrank.linalg import spectrum
from onnx_lowrank.passes.decompose.network import NO_GROUPS, ON_REQUEST, Link, NetworkFormat, network
from onnx_lowrank.passes.decompose.tensor_ring import COPIES, Rings, octaves
from onnx_lowrank.passes.decompose.tucker2 import TuckerCore

RATIOS = (2, 4)
_SPREAD = {2: 8, 3: 4}  # how far ranks go down, by their number: three of them make many combinations


class SemiTensorFormat(NetworkFormat):
    """Base of the three: the first entry of the rank is t, the others are sizes of bonds."""

    structure: ClassVar[int] = 1

    @abstractmethod
    def limits(self, shape: LayerShape, ratio: int) -> Rank:
        """The largest size of every bond."""

    @abstractmethod
    def steps(self, ratio: int) -> Rank:
        """What the size of every bond is a multiple of."""

    def refusal(self, shape: LayerShape) -> str | None:
        """Refuse groups, and channels that no ratio divides."""
        if shape.groups > 1:
            return f"{shape} has groups: {NO_GROUPS}"
        if math.gcd(shape.out, shape.in_) % RATIOS[0] or min(shape.out, shape.in_) < 2 * RATIOS[0]:
            return f"{shape} has no even number of channels above two on both sides: no ratio divides them"
        return None

    def ranks(self, shape: LayerShape, block: int) -> Sequence[Rank]:  # noqa: ARG002 - powers of two fill any block
        """Powers of two for every bond, where that saves weights and work."""
        found = [rank for ratio in RATIOS for rank in self._grid(shape, ratio)]
        return [rank for rank in found if self.saves(shape, rank)]

    def misfit(self, shape: LayerShape, rank: Rank) -> str | None:
        """Multiples of the ratio, which divides both sides."""
        if self.fits(shape, rank):
            return None
        sizes = ", ".join(
            f"{'a multiple of t' if step > 1 else 'a number'} up to {most}"
            for most, step in zip(self.limits(shape, 2), self.steps(2), strict=True)
        )
        return f"t, which divides {shape.out} and {shape.in_}, then {sizes}"

    def fits(self, shape: LayerShape, rank: Rank) -> bool:
        """Whether these are sizes of bonds, and a ratio, of the layer."""
        ratio, *bonds = rank or (0,)
        if ratio < 2 or shape.out % ratio or shape.in_ % ratio or len(bonds) != len(self.steps(ratio)):
            return False
        limits, steps = self.limits(shape, ratio), self.steps(ratio)
        return all(b > 0 and b % s == 0 and b <= most for b, most, s in zip(bonds, limits, steps, strict=True))

    def _grid(self, shape: LayerShape, ratio: int) -> list[Rank]:
        bonds, spread = zip(self.limits(shape, ratio), self.steps(ratio), strict=True), _SPREAD[len(self.steps(ratio))]
        sizes = itertools.product(*(octaves(most, step, spread) for most, step in bonds))
        return [rank for bonds in sizes if self.fits(shape, rank := (ratio, *bonds))]


@dataclass(frozen=True)
class SemiTensor(SemiTensorFormat):
    """Semi-tensor Tucker: 1/t^2 of the weights in both outer factors, each shared over t blocks of channels."""

    name: ClassVar[str] = "semi_tensor"
    on_request: ClassVar[str] = ON_REQUEST

    def limits(self, shape: LayerShape, ratio: int) -> Rank:
        """Both sides."""
        return shape.in_ // ratio * ratio, shape.out // ratio * ratio

    def steps(self, ratio: int) -> Rank:
        """Both bonds are cut."""
        return ratio, ratio

    def chain(self, shape: LayerShape, rank: Rank) -> Chain:
        """Three stages, the outer two folded."""
        ratio, r_in, r_out = rank
        sizes = _sides(shape, ratio) | {"p": r_in // ratio, "q": r_out // ratio}
        links = (Link("c", "p"), Link("np", "mq", tuple(range(len(shape.kernel)))), Link("q", "s"))
        return network(self.name, shape, links, "cn", "sm", sizes)

    def algorithm(self, weight: Array) -> Tucker:
        """HOSVD and HOOI of the outer factors."""
        return Tucker(weight)


@dataclass(frozen=True)
class SemiTensorTrain(SemiTensorFormat):
    """Semi-tensor train: the outer factors as in Tucker, the core between them in two stages."""

    name: ClassVar[str] = "semi_tensor_train"
    on_request: ClassVar[str] = ON_REQUEST

    def limits(self, shape: LayerShape, ratio: int) -> Rank:
        """Both sides, and the smaller side of the whole core between the stages."""
        first, last = (math.prod(kernel) for kernel in halves(shape.kernel))
        middle = min(shape.in_ * first, shape.out * last)
        return shape.in_ // ratio * ratio, middle, shape.out // ratio * ratio

    def steps(self, ratio: int) -> Rank:
        """The bond in the middle is whole."""
        return ratio, 1, ratio

    def chain(self, shape: LayerShape, rank: Rank) -> Chain:
        """Four stages, the outer two folded."""
        ratio, r_in, middle, r_out = rank
        sizes = _sides(shape, ratio) | {"p": r_in // ratio, "q": r_out // ratio, "r": middle}
        axes, one = range(len(shape.kernel)), split_axis(shape.kernel)
        first, rest = (tuple(axis for axis in axes if (axis == one) == mine) for mine in (True, False))
        links = (Link("c", "p"), Link("np", "r", first), Link("r", "mq", rest), Link("q", "s"))
        return network(self.name, shape, links, "cn", "sm", sizes)

    def algorithm(self, weight: Array) -> Train:
        """Tucker, and the SVD of its core."""
        return Train(weight)


@dataclass(frozen=True)
class SemiTensorRing(SemiTensorFormat):
    """Semi-tensor ring: a tensor ring whose 1x1 factors have 1/t^2 of the weights, each shared over t blocks."""

    name: ClassVar[str] = "semi_tensor_ring"
    on_request: ClassVar[str] = ON_REQUEST

    def refusal(self, shape: LayerShape) -> str | None:
        """Refuse matrices, too."""
        if shape.is_matrix:
            return f"{shape} has no kernel: semi_tensor has one stage less"
        return super().refusal(shape)

    def limits(self, shape: LayerShape, ratio: int) -> Rank:
        """One copy of the channels outside."""
        rows = min(shape.out, shape.inputs)
        return rows // ratio * ratio, min(rows, shape.in_), shape.in_ // ratio * ratio

    def fits(self, shape: LayerShape, rank: Rank) -> bool:
        """No more channels between the factors than outside."""
        if not super().fits(shape, rank):
            return False
        _, a, b, e = rank
        return a * b <= min(shape.out, shape.inputs) and b * e <= shape.in_

    def _grid(self, shape: LayerShape, ratio: int) -> list[Rank]:
        sides = [octaves(most // COPIES[0], ratio, 4) for most in (min(shape.out, shape.inputs), shape.in_)]
        found = [(ratio, a, b, e) for b in COPIES for a in sides[0] for e in sides[1]]
        return [rank for rank in found if self.fits(shape, rank)]

    def steps(self, ratio: int) -> Rank:
        """The outer bonds are cut, the copies are whole."""
        return ratio, 1, ratio

    def chain(self, shape: LayerShape, rank: Rank) -> Chain:
        """Three stages, all folded."""
        ratio, a, b, e = rank
        sizes = _sides(shape, ratio) | {"a": a // ratio, "b": b, "e": e // ratio}
        links = (Link("c", "be"), Link("ne", "ma", tuple(range(len(shape.kernel)))), Link("ba", "s"))
        return network(self.name, shape, links, "cn", "sm", sizes)

    def algorithm(self, weight: Array) -> SlicedRing:
        """The ring of the weight as a tensor of larger slices."""
        return SlicedRing(weight)


class Tucker:
    """Tucker-2 of W[s, c, (m, n, kernel)]; the bases of the last ratio are kept.

    Args:
        weight: (1, S, C, *kernel).
    """

    def __init__(self, weight: Array) -> None:
        self._weight, self._kernel = weight, weight.shape[3:]
        self._made: dict[int, TuckerCore] = {}

    def __call__(self, rank: Rank) -> tuple[Array, ...]:
        """First (1, p, c, 1..), core (1, m, q, n, p, *k), last (1, s, q, 1..)."""
        ratio, r_in, r_out = rank
        if ratio not in self._made:
            tensor = sliced(self._weight, ratio)
            self._made = {ratio: TuckerCore(tensor[None], tensor.shape[2:], 3)}
        first, core, last = self._made[ratio].factors((r_in // ratio, r_out // ratio))
        ones = (1,) * len(self._kernel)
        core = core[0].reshape(r_out // ratio, r_in // ratio, ratio, ratio, -1).transpose(2, 0, 3, 1, 4)
        shape = (1, ratio, r_out // ratio, ratio, r_in // ratio, *self._kernel)
        return first.reshape(*first.shape[:3], *ones), core.reshape(shape), last.reshape(*last.shape[:3], *ones)


class Train(Tucker):
    """Tucker, and the truncated SVD of its core with rows (m, q, other axes) and columns (n, p, one axis)."""

    def __call__(self, rank: Rank) -> tuple[Array, ...]:
        """First (1, p, c, 1..), (1, r, n, p, k_1, 1..), (1, m, q, r, 1, k_2 ..), last (1, s, q, 1..)."""
        ratio, r_in, middle, r_out = rank
        first, core, last = super().__call__((ratio, r_in, r_out))
        head, rest = halves(self._kernel)
        before = math.prod(self._kernel[: split_axis(self._kernel)])
        split = core.reshape(r_out, r_in, before, math.prod(head), -1).transpose(0, 2, 4, 1, 3)
        matrix = split.reshape(1, r_out * math.prod(rest), -1)
        rank_of = min(middle, *matrix.shape[1:])
        a, b = (np.zeros((matrix.shape[1], middle)), np.zeros((middle, matrix.shape[2])))
        left, right = spectrum(matrix).truncated(rank_of)
        a[:, :rank_of], b[:rank_of] = left[0], right[0]
        outer = a.reshape(r_out, math.prod(rest), middle).swapaxes(1, 2)
        return (
            first,
            b.reshape(1, middle, ratio, r_in // ratio, *head),
            outer.reshape(1, ratio, r_out // ratio, middle, *rest),
            last,
        )


class SlicedRing:
    """Rings of W[s, c, (m, n, kernel)]; the bases of the last ratio are kept.

    Args:
        weight: (1, S, C, *kernel).
    """

    def __init__(self, weight: Array) -> None:
        self._weight, self._kernel = weight, weight.shape[3:]
        self._made: dict[int, Rings] = {}

    def __call__(self, rank: Rank) -> tuple[Array, ...]:
        """V (1, b, e, c, 1..), Q (1, m, a, n, e, *k), U (1, s, b, a, 1..)."""
        ratio, a, b, e = rank
        a, e, ones = a // ratio, e // ratio, (1,) * len(self._kernel)
        if ratio not in self._made:
            self._made = {ratio: Rings(sliced(self._weight, ratio))}
        u, v, q = self._made[ratio]((a, b, e))
        middle = q.reshape(e, ratio, ratio, -1, a).transpose(1, 4, 2, 0, 3)
        return (
            v.transpose(0, 2, 1).reshape(1, b, e, -1, *ones),
            middle.reshape(1, ratio, a, ratio, e, *self._kernel),
            u.transpose(1, 2, 0).reshape(1, -1, b, a, *ones),
        )


def sliced(weight: Array, ratio: int) -> Array:
    """A weight (1, s m, c n, *kernel) as a tensor (s, c, m n kernel)."""
    _, out, in_, *kernel = weight.shape
    split = weight.reshape(out // ratio, ratio, in_ // ratio, ratio, math.prod(kernel))
    return split.transpose(0, 2, 1, 3, 4).reshape(out // ratio, in_ // ratio, -1)


def _sides(shape: LayerShape, ratio: int) -> dict[str, int]:
    return {"s": shape.out // ratio, "m": ratio, "c": shape.in_ // ratio, "n": ratio}
