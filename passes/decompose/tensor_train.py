"""Tensor train: 1x1 C->r1, kh x 1 r1->r2, 1 x kw r2->r3, 1x1 r3->S (Oseledets, SIAM J. Sci. Comput. 2011).

The weight as a tensor C x kh x kw x S is a train of four cores. With U_in and U_out the leading left singular vectors
of the C and S unfoldings and G = U_out^T W U_in, the middle two cores are the truncated SVD of G's (r1 kh) x (kw r3)
unfolding. All of it projects, so the squared error is ||W||^2 minus the energy of the r2 largest singular values there,
exactly, and never rises with any rank. With three spatial axes the first one is split from the other two.

Calibrated, see `fitted`. Weights per group: C r1 + r1 kh r2 + r2 kw r3 + r3 S. The rank is (r1, r2, r3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnx_lowrank.chain import Chain, Stage
from onnx_lowrank.decomposition import Decomposition, Factorization, Rank, halves, spaced, split_axis
from onnx_lowrank.layer import Array, LayerShape, Shape
from onnx_lowrank.linalg import spectrum
from onnx_lowrank.passes.decompose.fitted import Fitted
from onnx_lowrank.passes.decompose.tucker2 import core_of, subspaces
from onnx_lowrank.passes.decompose.whitened import usable

_SKEW = 1.35  # the shares of channels kept at both ends differ by this factor at most


class Train(Factorization):
    """Bases of both ends, and the singular values in the middle for every pair of end ranks asked for.

    Args:
        weight: (g, S, C, *kernel).
        first: Kernel of the first middle stage.
        rest: Kernel of the second.
    """

    def __init__(self, weight: Array, first: Shape, rest: Shape) -> None:
        self._first, self._rest = first, rest
        groups, out, in_ = weight.shape[:3]
        flat = weight.astype(np.float64, copy=False).reshape(groups, out, in_, -1)
        self._out = subspaces([w.reshape(out, -1) for w in flat])
        self._in = subspaces([w.transpose(1, 0, 2).reshape(in_, -1) for w in flat])
        self._core = core_of(flat, self._out, self._in)
        self._total = float(np.vdot(flat, flat))
        self._kept: dict[tuple[int, int], Array] = {}

    def error(self, rank: Rank) -> float:
        """Relative Frobenius error, exact."""
        left, middle, right = rank
        if self._total <= 0:
            return 0.0
        if (left, right) not in self._kept:
            matrix = self._middle(left, right)
            short = matrix if matrix.shape[1] <= matrix.shape[2] else matrix.swapaxes(1, 2)
            values = np.linalg.eigvalsh(short @ short.swapaxes(1, 2)).sum(axis=0)
            self._kept[left, right] = values[::-1].clip(0.0).cumsum()
        kept = self._kept[left, right]
        lost = 1.0 - float(kept[min(middle, len(kept)) - 1]) / self._total
        return math.sqrt(lost) if lost > 1e-14 else 0.0

    def factors(self, rank: Rank) -> tuple[Array, ...]:
        """Weights (g, r1, C, 1..), (g, r2, r1, *k_first), (g, r3, r2, *k_rest), (g, S, r3, 1..)."""
        left, middle, right = rank
        groups, out, in_ = len(self._core), self._out.shape[1], self._in.shape[1]
        ones = (1,) * len(self._first)
        a, b = spectrum(self._middle(left, right)).truncated(middle)
        missing = middle - a.shape[2]
        a, b = np.pad(a, ((0, 0), (0, 0), (0, missing))), np.pad(b, ((0, 0), (0, missing), (0, 0)))
        return (
            self._in[:, :, :left].swapaxes(1, 2).reshape(groups, left, in_, *ones),
            a.reshape(groups, left, -1, middle).transpose(0, 3, 1, 2).reshape(groups, middle, left, *self._first),
            b.reshape(groups, middle, -1, right).transpose(0, 3, 1, 2).reshape(groups, right, middle, *self._rest),
            self._out[:, :, :right].reshape(groups, out, right, *ones),
        )

    def _middle(self, left: int, right: int) -> Array:
        """G's leading block as (r1 k_first) x (k_rest r3)."""
        block = self._core[:, :right, :left]
        block = block.reshape(len(block), right, left, math.prod(self._first), -1)
        return block.transpose(0, 2, 3, 4, 1).reshape(len(block), left * math.prod(self._first), -1)


class CalibratedTrain(Fitted):
    """Trains of the weight, the last core solved for the outputs."""

    def __init__(self, method: TensorTrain, weight: Array, gram: Array) -> None:
        super().__init__(method, weight, gram)
        self._train = Train(weight, *halves(self.shape.kernel))

    def fit(self, rank: Rank) -> tuple[Array, ...]:
        """The data-free train."""
        return self._train.factors(rank)

    def exact(self) -> tuple[Array, ...]:
        """The data-free train at full rank."""
        return self._train.factors(self.method.exact_rank(self.shape) or ())


@dataclass(frozen=True)
class TensorTrain(Decomposition):
    """Tensor train by orthogonal bases: 1x1 C->r1, kh x 1 r1->r2, 1 x kw r2->r3, 1x1 r3->S."""

    name: ClassVar[str] = "tensor_train"
    by_rank: ClassVar[bool] = True
    on_request: ClassVar[str] = "it has three ranks, and so many chains to time"

    def refusal(self, shape: LayerShape) -> str | None:
        """Refuse what has no two spatial axes, or a side with one channel."""
        if shape.is_matrix:
            return f"{shape} has no kernel: svd reaches the same error with fewer stages"
        if sum(k > 1 for k in shape.kernel) < 2:
            return f"{shape} has one spatial axis: tucker2 gives the same chain"
        if min(shape.out, shape.in_) < 2:
            return f"{shape} has one channel on a side: spatial_svd needs fewer stages"
        return None

    def ranks(self, shape: LayerShape, block: int) -> Sequence[Rank]:
        """Ends that keep about the same share of their channels, middles from the smaller end up."""
        first, rest = (math.prod(kernel) for kernel in halves(shape.kernel))
        found: list[Rank] = []
        for left in spaced(shape.in_, block):
            for right in spaced(shape.out, block):
                if not 1 / _SKEW <= left * shape.out / (right * shape.in_) <= _SKEW:
                    continue
                most = min(left * first, right * rest)
                found.extend((left, middle, right) for middle in spaced(most, block)[::2] if middle >= min(left, right))
        return [rank for rank in found if self.chain(shape, rank).params < shape.params]

    def chain(self, shape: LayerShape, rank: Rank) -> Chain:
        """Four stages, the two in the middle carry the kernel."""
        left, middle, right = rank
        first, rest = halves(shape.kernel)
        n, ones = len(shape.kernel), (1,) * len(shape.kernel)
        one = split_axis(shape.kernel)
        others = tuple(axis for axis in range(n) if axis != one)
        k = "hwd"[:n]
        early = "".join(k[axis] if axis == one else "ABD"[axis] for axis in range(n))
        late = "".join(k[axis] if axis != one else "E" for axis in range(n))
        return Chain(
            method=self.name,
            stages=(
                Stage(shape.groups, left, shape.in_, ones),
                Stage(shape.groups, middle, left, first, (one,)),
                Stage(shape.groups, right, middle, rest, others),
                Stage(shape.groups, shape.out, right, ones),
            ),
            equation=f"gpc{'FGH'[:n]},gmp{early},gqm{late},gsq{'XYZ'[:n]}->gsc{k}",
        )

    def factorize(self, weight: Array, gram: Array | None = None, *, most: Rank | None = None) -> Factorization:  # noqa: ARG002 - one pair of bases serves every rank
        """Bases of both ends of every group; the last stage solved for the outputs if there is a second moment."""
        moment = usable(gram)
        kernel = weight.shape[3:]
        if moment is None:
            return Train(weight, *halves(kernel))
        return CalibratedTrain(self, weight, moment)

    def exact_rank(self, shape: LayerShape) -> Rank:
        """Full rank at both ends and in the middle."""
        first, rest = (math.prod(kernel) for kernel in halves(shape.kernel))
        return (shape.in_, min(shape.in_ * first, shape.out * rest), shape.out)
