"""Kronecker product decomposition: W = sum over q <= R of A_q (x) B_q, of matrices and of convolutions.

    W[s1 S2 + s2, c1 C2 + c2, kernel] = sum over q of A_q[s1, c1, its kernel] B_q[s2, c2, its kernel]

(KPD: Thakker et al., 2019; GKPD: Hameed et al., CVPR 2022.)
With A_q as rows (s1, c1, its kernel) and B_q as columns (s2, c2, its kernel), the rearranged weight is a matrix whose
truncated SVD gives the best R terms (Van Loan and Pitsianis, 1993). The chain: B maps c2 to (s2, q), shared over c1; A
maps (c1, q) to s1, shared over s2. R (S1 C1 prod k1 + S2 C2 prod k2) weights.

Every spatial axis of the kernel goes to A or to B as a whole: half an axis could not carry the padding SAME exactly.
The rank is (S1, C1, *kernel of A, R): the shape of A, and the number of terms.

Only the weight tells which shape is the best: of a 512->512 3x3 layer of HED, at half of the work, the best of all errs
by 0.32 and the best of those with the cheapest terms by 0.57. So the singular values of all shapes are taken; of wide
layers, as far as the work goes, of those that are few cuts from a matrix product or have few terms.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from onnx_lowrank.chain import Chain
from onnx_lowrank.decomposition import Factorization, Rank
from onnx_lowrank.layer import Array, LayerShape, Shape
from onnx_lowrank.linalg import Spectrum, singular_values, spectrum, tail
from onnx_lowrank.passes.decompose.network import NO_GROUPS, ON_REQUEST, Algorithm, Link, NetworkFormat, network
from onnx_lowrank.passes.decompose.whitened import usable

_WORK = 8e10  # multiply-accumulates of the Gram matrices of one layer: all shapes of 256->256 3x3
_BUDGETS = tuple(0.5 ** (i / 6) for i in range(35))  # shares of the layer: its weights, or its work


class VanLoan(Factorization):
    """The rearranged weight of every shape of A asked for; errors are exact for any number of terms.

    Singular values are kept, vectors of the last shape only: those of all shapes would be many times the weight.

    Args:
        weight: (1, S, C, *kernel), float64.
    """

    def __init__(self, weight: Array) -> None:
        self._weight = weight[0]
        self._values: dict[Shape, Array] = {}
        self._made: tuple[Shape, Spectrum] | None = None

    def error(self, rank: Rank) -> float:
        """Relative Frobenius error, exact."""
        mine, terms = rank[:-1], rank[-1]
        if mine not in self._values:
            self._values[mine] = singular_values(self._rearranged(mine))
        return tail(self._values[mine], terms)

    def best(self, shares: Mapping[Rank, float]) -> list[Rank]:
        """Of every budget the rank with the least error; the cheapest one where none is within any."""
        ranked = sorted(shares, key=lambda rank: (self.error(rank), shares[rank], rank))
        found = [next((rank for rank in ranked if shares[rank] <= budget), None) for budget in _BUDGETS]
        return list(dict.fromkeys(rank for rank in found if rank)) or sorted(shares, key=lambda rank: shares[rank])[:1]

    def factors(self, rank: Rank) -> tuple[Array, ...]:
        """B (1, S2, R, C2, *k2) and A (1, S1, C1, R, *k1)."""
        *mine, terms = rank
        theirs = [whole // part for whole, part in zip(self._weight.shape, mine, strict=True)]
        if self._made is None or self._made[0] != tuple(mine):
            self._made = tuple(mine), spectrum(self._rearranged(tuple(mine)))
        a, b = self._made[1].truncated(terms)
        left = np.moveaxis(a[0].reshape(*mine, terms), -1, 2)
        right = np.moveaxis(b[0].reshape(terms, *theirs), 0, 1)
        return right[None], left[None]

    def _rearranged(self, mine: Shape) -> Array:
        """Rows (s1, c1, A's kernel), columns (s2, c2, B's kernel); a stack of one."""
        pairs = [(part, whole // part) for whole, part in zip(self._weight.shape, mine, strict=True)]
        split = self._weight.reshape([size for pair in pairs for size in pair])
        rows = split.transpose([*range(0, split.ndim, 2), *range(1, split.ndim, 2)])
        return rows.reshape(1, math.prod(mine), -1)


@dataclass(frozen=True)
class _Split:
    """The shape of A, (S1, C1, *k1), in a layer; what is left is that of B."""

    shape: LayerShape
    mine: Shape

    @cached_property
    def theirs(self) -> Shape:
        whole = self.shape.weight[1:]
        return tuple(size // part for size, part in zip(whole, self.mine, strict=True))

    @property
    def exact(self) -> int:
        """Terms that reproduce any weight."""
        return min(math.prod(self.mine), math.prod(self.theirs))

    @property
    def cuts(self) -> int:
        """How far the channels are from a matrix product of whole sides: 1 of every svd."""
        return math.prod(min(mine, theirs) for mine, theirs in zip(self.mine[:2], self.theirs[:2], strict=True))

    @property
    def weights(self) -> int:
        """Of one term."""
        return math.prod(self.mine) + math.prod(self.theirs)

    @property
    def macs(self) -> int:
        """Of one term, per output position."""
        return self.theirs[0] * math.prod(self.mine) + self.mine[1] * math.prod(self.theirs)

    @property
    def terms(self) -> list[int]:
        """The most that every budget of weights and of work buys, as far as both are saved."""
        dense = self.shape.params
        most = min(self.exact, (dense - 1) // self.weights, dense // self.macs)
        bought = {int(share * dense) // per for share in _BUDGETS for per in (self.weights, self.macs)}
        return sorted({min(terms, most) for terms in bought} - {0})


@dataclass(frozen=True)
class Kronecker(NetworkFormat):
    """Sum of Kronecker products A (x) B, the shape of A searched: B shared over blocks of inputs, then A."""

    name: ClassVar[str] = "kronecker"
    on_request: ClassVar[str] = ON_REQUEST
    structure: ClassVar[int] = -1

    def refusal(self, shape: LayerShape) -> str | None:
        """Refuse groups, and layers whose channels cannot be cut."""
        if shape.groups > 1:
            return f"{shape} has groups: {NO_GROUPS}"
        if not _splits(shape):
            return f"{shape} has prime numbers of channels: every Kronecker product of that shape is an svd"
        return None

    def ranks(self, shape: LayerShape, block: int) -> Sequence[Rank]:  # noqa: ARG002 - terms do not fill channel blocks
        """All shapes of A that are looked at, each with the most terms that every budget buys."""
        return [(*split.mine, terms) for split in _looked_at(shape) for terms in split.terms]

    def promising(self, weight: Array, shares: Mapping[Rank, float]) -> Sequence[Rank]:
        """The best of 35 budgets for the weight alone: one SVD per shape of A tells."""
        return VanLoan(weight.astype(np.float64, copy=False)).best(shares)

    def chain(self, shape: LayerShape, rank: Rank) -> Chain:
        """B, then A."""
        s1, c1, *kernel, terms = rank
        first = tuple(axis for axis, part in enumerate(kernel) if part == 1)
        last = tuple(axis for axis, part in enumerate(kernel) if part > 1)
        sizes = {"s": s1, "t": shape.out // s1, "c": c1, "d": shape.in_ // c1, "r": terms}
        links = (Link("d", "tr", first), Link("cr", "s", last))
        return network(self.name, shape, links, "cd", "st", sizes)

    def factorize(self, weight: Array, gram: Array | None = None, *, most: Rank | None = None) -> Factorization:
        """One SVD for all terms of a shape of A; in the metric of the outputs every rank is fitted by itself."""
        if usable(gram) is None:
            return VanLoan(weight.astype(np.float64, copy=False))
        return super().factorize(weight, gram, most=most)

    def algorithm(self, weight: Array) -> Algorithm:
        """The SVD of the rearranged weight."""
        return VanLoan(weight).factors

    def misfit(self, shape: LayerShape, rank: Rank) -> str | None:
        """The shape of A has to divide that of the weight, the kernel axis by axis wholly or not at all."""
        whole = shape.weight[1:]
        if len(rank) == 1 + len(whole) and all(part > 0 for part in rank):
            channels = all(size % part == 0 for size, part in zip(whole[:2], rank[:2], strict=True))
            kernel = all(part in {1, size} for size, part in zip(whole[2:], rank[2:-1], strict=True))
            if channels and kernel and rank[-1] <= _Split(shape, rank[:-1]).exact:
                return None
        parts = "".join(f", 1 or {size}" for size in whole[2:])
        return f"a divisor of {shape.out}, one of {shape.in_}{parts}, and no more terms than are exact"


def _splits(shape: LayerShape) -> list[_Split]:
    """All shapes of A but those of which another method is the better name: svd and spatial_svd cut no side."""
    kernels = itertools.product(*({1, size} for size in shape.kernel))
    sides = itertools.product(_divisors(shape.out), _divisors(shape.in_), sorted(kernels))
    splits = [(s1, c1, kernel) for s1, c1, kernel in sides if 1 < s1 < shape.out or 1 < c1 < shape.in_]
    return [_Split(shape, (s1, c1, *kernel)) for s1, c1, kernel in splits]


def _looked_at(shape: LayerShape) -> list[_Split]:
    """The shapes of A whose singular values are worth their time."""
    splits = sorted(_splits(shape), key=lambda split: (split.cuts * split.exact, split.mine))
    work = itertools.accumulate(split.exact * shape.params for split in splits)
    return [split for split, spent in zip(splits, work, strict=True) if spent <= _WORK]


def _divisors(number: int) -> list[int]:
    return [part for part in range(1, number + 1) if number % part == 0]
