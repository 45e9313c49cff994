"""What every two-stage spectral method shares: cut one unfolding of the weight, put each half into one stage.

The kernel's spatial axes are divided between the stages: the first carries the axes F, the last the axes L. With
rows (s, k_L) and columns (c, k_F) the weight is a matrix M, and the truncated SVD M ~ A B is the best chain of its form
in the Frobenius norm (Eckart-Young). Everything else is reshaping:

    stage 1: C -> r, kernel k_F, weights B;    stage 2: r -> S, kernel k_L, weights A.

Weights per group: r (C prod k_F + S prod k_L).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

from onnx_lowrank.chain import Chain, Stage
from onnx_lowrank.decomposition import Decomposition, Factorization, Rank, aligned
from onnx_lowrank.layer import Array, LayerShape, Shape
from onnx_lowrank.linalg import Spectrum, spectrum


class UnfoldingCut(Factorization):
    """An unfolding decomposed once; its errors are exact at every rank."""

    def __init__(self, cut: Spectrum, first: Shape, last: Shape) -> None:
        self._cut, self._first, self._last = cut, first, last

    def error(self, rank: Rank) -> float:
        """Relative Frobenius error, exact."""
        return self._cut.tail(rank[0])

    def spectral_error(self, rank: Rank) -> float:
        """First singular value cut, relative to the largest, exact."""
        return self._cut.next_value(rank[0])

    def factors(self, rank: Rank) -> tuple[Array, ...]:
        """Weights (g, r, C, *k_F) and (g, S, r, *k_L)."""
        a, b = self._cut.truncated(rank[0])
        groups, out, *kernel = self._last
        first = b.reshape(groups, rank[0], *self._first[2:])
        last = a.reshape(groups, out, -1, rank[0]).swapaxes(2, 3)
        return first, last.reshape(groups, out, rank[0], *kernel)


class TwoStage(Decomposition):
    """Base of svd and spatial_svd: subclasses say which spatial axes the first stage carries."""

    @abstractmethod
    def first_axes(self, kernel: Shape) -> Shape:
        """Spatial axes the first stage carries."""

    def _halves(self, shape: LayerShape) -> tuple[Shape, Shape]:
        """Kernels of the first and the last stage."""
        mine = self.first_axes(shape.kernel)
        first = tuple(k if axis in mine else 1 for axis, k in enumerate(shape.kernel))
        last = tuple(1 if axis in mine else k for axis, k in enumerate(shape.kernel))
        return first, last

    def ranks(self, shape: LayerShape, block: int) -> Sequence[Rank]:
        """Ranks with fewer weights than the dense layer."""
        first, last = self._halves(shape)
        per_rank = shape.in_ * math.prod(first) + shape.out * math.prod(last)
        limit = (shape.out * shape.in_ * math.prod(shape.kernel) - 1) // per_rank
        return [(rank,) for rank in aligned(min(limit, self.exact_rank(shape)[0]), block)]

    def chain(self, shape: LayerShape, rank: Rank) -> Chain:
        """The two stages."""
        mine = self.first_axes(shape.kernel)
        rest = tuple(axis for axis in range(len(shape.kernel)) if axis not in mine)
        first, last = self._halves(shape)
        inner = "hwd"[: len(shape.kernel)]
        outer = inner.upper()
        result = "".join(inner[axis] if axis in mine else outer[axis] for axis in range(len(shape.kernel)))
        return Chain(
            method=self.name,
            stages=(
                Stage(shape.groups, rank[0], shape.in_, first, mine),
                Stage(shape.groups, shape.out, rank[0], last, rest),
            ),
            equation=f"grc{inner},gsr{outer}->gsc{result}",
        )

    def factorize(self, weight: Array) -> Factorization:
        """SVD of the unfolding (S prod k_L) x (C prod k_F) of every group."""
        groups, out, in_, *kernel = weight.shape
        mine = self.first_axes(tuple(kernel))
        rest = [axis for axis in range(len(kernel)) if axis not in mine]
        order = (0, 1, *(3 + axis for axis in rest), 2, *(3 + axis for axis in mine))
        rows = out * math.prod(kernel[axis] for axis in rest)
        matrix = weight.transpose(order).reshape(groups, rows, -1)
        first, last = self._halves(LayerShape(groups, out, in_, tuple(kernel)))
        return UnfoldingCut(spectrum(matrix), (groups, 0, in_, *first), (groups, out, *last))

    def exact_rank(self, shape: LayerShape) -> Rank:
        """The smaller side of the unfolding."""
        first, last = self._halves(shape)
        return (min(shape.in_ * math.prod(first), shape.out * math.prod(last)),)
