"""Truncated SVD across channels: a kxk convolution C->r and a 1x1 convolution r->S, or the reverse.

Output side (Zhang et al., TPAMI 2016; the channel scheme of trained rank pruning): the unfolding S x (C kh kw) is cut
and the first stage carries the kernel: r C kh kw + S r weights. Input side: (S kh kw) x C is cut and the last stage
carries it: r C + S r kh kw. On Gemm, MatMul and 1x1 convolutions the two are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnx_lowrank.layer import LayerShape, Shape
from onnx_lowrank.passes.decompose.two_stage import TwoStage


@dataclass(frozen=True)
class Svd(TwoStage):
    """Channel SVD, kernel in the first stage: kxk C->r, 1x1 r->S."""

    name: ClassVar[str] = "svd"
    whole_rows: ClassVar[bool] = True

    def first_axes(self, kernel: Shape) -> Shape:
        """All of them."""
        return tuple(range(len(kernel)))

    def refusal(self, shape: LayerShape) -> str | None:
        """Refuse layers that are vectors."""
        if self.exact_rank(shape)[0] < 2:
            return f"{shape} is a vector: there is no rank to cut"
        return None


@dataclass(frozen=True)
class SvdInput(TwoStage):
    """Channel SVD, kernel in the last stage: 1x1 C->r, kxk r->S."""

    name: ClassVar[str] = "svd_input"

    def first_axes(self, kernel: Shape) -> Shape:  # noqa: ARG002 - the protocol's signature
        """None of them."""
        return ()

    def refusal(self, shape: LayerShape) -> str | None:
        """Refuse where the output side is the same chain."""
        if shape.is_matrix:
            return f"{shape} has no kernel: svd gives the same chain"
        if min(shape.out, shape.in_) < 2:
            return f"{shape} has one channel on a side: there is no rank to cut"
        return None
