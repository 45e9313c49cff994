"""Spatial SVD: a kh x 1 convolution C->r and a 1 x kw convolution r->S, in either order.

The unfolding (S kw) x (C kh) is cut (Jaderberg et al., BMVC 2014; the spatial scheme of trained rank pruning). With
three spatial axes the first one longer than one is split from the other two. r C kh + S r kw weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnx_lowrank.decomposition import split_axis
from onnx_lowrank.layer import LayerShape, Shape
from onnx_lowrank.passes.decompose.two_stage import TwoStage


class _Spatial(TwoStage):
    twin: ClassVar[str]

    def refusal(self, shape: LayerShape) -> str | None:
        """Refuse what has no two spatial axes longer than one."""
        if shape.is_matrix:
            return f"{shape} has no kernel: there is nothing to separate"
        if sum(k > 1 for k in shape.kernel) < 2:
            return f"{shape} has one spatial axis: {self.twin} gives the same chain"
        return None


@dataclass(frozen=True)
class SpatialSvd(_Spatial):
    """Spatial SVD, first axis first: kh x 1 C->r, 1 x kw r->S."""

    name: ClassVar[str] = "spatial_svd"
    twin: ClassVar[str] = "svd"

    def first_axes(self, kernel: Shape) -> Shape:
        """The height (the depth of a 3-D kernel), or what comes next if that is one."""
        return (split_axis(kernel),)


@dataclass(frozen=True)
class SpatialSvdReversed(_Spatial):
    """Spatial SVD, last axes first: 1 x kw C->r, kh x 1 r->S."""

    name: ClassVar[str] = "spatial_svd_reversed"
    twin: ClassVar[str] = "svd_input"

    def first_axes(self, kernel: Shape) -> Shape:
        """The width (height and width of a 3-D kernel): all but that of `spatial_svd`."""
        return tuple(axis for axis in range(len(kernel)) if axis != split_axis(kernel))
