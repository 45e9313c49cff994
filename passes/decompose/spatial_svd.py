"""Spatial SVD: a kh x 1 convolution C->r and a 1 x kw convolution r->S, in either order.

The unfolding (S kw) x (C kh) is cut (Jaderberg et al., BMVC 2014; the spatial scheme of trained rank pruning). With
three spatial axes the first one is split from the other two. r C kh + S r kw weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnx_lowrank.layer import LayerShape, Shape
from onnx_lowrank.passes.decompose.two_stage import TwoStage


class _Spatial(TwoStage):
    def refusal(self, shape: LayerShape) -> str | None:
        """Refuse what has no two spatial axes of its own."""
        if len(shape.kernel) < 2:
            return f"{shape} has fewer than two spatial axes: there is nothing to separate"
        first, last = self._halves(shape)
        if max(first) == 1 or max(last) == 1:
            return f"{shape} is 1 wide along one spatial axis: svd gives the same chain"
        return None


@dataclass(frozen=True)
class SpatialSvd(_Spatial):
    """Spatial SVD, first axis first: kh x 1 C->r, 1 x kw r->S."""

    name: ClassVar[str] = "spatial_svd"

    def first_axes(self, kernel: Shape) -> Shape:  # noqa: ARG002 - the protocol's signature
        """The height (the depth of a 3-D kernel)."""
        return (0,)


@dataclass(frozen=True)
class SpatialSvdReversed(_Spatial):
    """Spatial SVD, last axes first: 1 x kw C->r, kh x 1 r->S."""

    name: ClassVar[str] = "spatial_svd_reversed"

    def first_axes(self, kernel: Shape) -> Shape:
        """The width (height and width of a 3-D kernel)."""
        return tuple(range(1, len(kernel)))
