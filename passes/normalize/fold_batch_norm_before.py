"""BatchNormalization before a weight, or Mul, Div, Add, Sub before a Conv: W (s x + t) + b = (W s) x + (W t + b).

A shift t is folded only where the node pads nothing: padding zeros are not shifted, so with pads > 0 the border of
W (s x + t) differs. A scale alone is always exact. Elementwise operators before Gemm and MatMul stay: there they are
mostly the end of a LayerNormalization or Gelu, and onnxruntime fuses those only while they are complete.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from onnx import NodeProto

from onnx_lowrank.graph.scope import Scope
from onnx_lowrank.graph.tensor import DEFAULT_DOMAINS
from onnx_lowrank.passes.normalize.constants import Vector
from onnx_lowrank.passes.normalize.fold_batch_norm import batch_norm_statistics
from onnx_lowrank.passes.normalize.fold_mul_add import constant_affine
from onnx_lowrank.passes.normalize.linear import Linear, extent, linear
from onnx_lowrank.passes.normalize.node_rule import NodeRule, attribute, label
from onnx_lowrank.transform import Note


@dataclass(frozen=True)
class FoldBatchNormBefore(NodeRule):
    """Fold BatchNormalization into the Conv, Gemm or MatMul after it, constant Mul, Div, Add and Sub into a Conv."""

    name: ClassVar[str] = "fold_batch_norm_before"

    def rewrite(self, scope: Scope, node: NodeProto) -> Note | None:
        """Fold the producer of the input of `node`, a Conv, Gemm or MatMul, into it."""
        layer = linear(scope, node)
        before = scope.producer(node.input[0]) if layer is not None else None
        if layer is None or before is None or before.domain not in DEFAULT_DOMAINS:
            return None
        if scope.sole_consumer(before.output[0]) is not node or attribute(node, "transA", 0):
            return None
        for at in _operands(before):
            affine = _affine(scope, before, at, layer)
            if affine is not None and layer.absorb_before(*affine):
                node.input[0] = before.input[at]
                scope.remove(before)
                return Note(label(before), f"{before.op_type} {label(before)} folded into {label(node)} after it")
        return None


def _operands(node: NodeProto) -> tuple[int, ...]:
    """Which inputs of `node` may be the activation."""
    match node.op_type:
        case "BatchNormalization" | "Div" | "Sub":
            return (0,)
        case "Mul" | "Add":
            return (0, 1)
        case _:
            return ()


def _affine(scope: Scope, node: NodeProto, at: int, layer: Linear) -> tuple[Vector, Vector] | None:
    if node.op_type == "BatchNormalization":
        if layer.node.op_type == "MatMul" and layer.rank != 2:
            return None
        statistics = batch_norm_statistics(scope, node)
        return statistics if statistics is not None and len(statistics[0]) == layer.in_channels else None
    if layer.node.op_type != "Conv" or _closes_gelu(scope, node):
        return None
    # A constant may also stretch an operand whose channel axis has size 1, or raise its rank.
    known = extent(scope, node.input[at], layer.trailing)
    if known is not None and known[1] == layer.in_channels:
        return constant_affine(scope, node, at, layer.in_channels, layer.trailing, known[0])
    tensor = scope.constant_source(node.input[1 - at])
    harmless = tensor is not None and math.prod(tensor.dims) == 1 and len(tensor.dims) < layer.rank
    return constant_affine(scope, node, at, layer.in_channels, layer.trailing, layer.rank) if harmless else None


def _closes_gelu(scope: Scope, node: NodeProto) -> bool:
    """Whether `node` may be the last of x * (1 + erf(x / sqrt 2)) / 2, which runtimes fuse only as a whole."""
    product = next((p for p in map(scope.producer, node.input) if p is not None and p.op_type == "Mul"), None)
    sums = [p for p in map(scope.producer, product.input) if p is not None and p.op_type == "Add"] if product else []
    gates = [p.op_type for add in sums for p in map(scope.producer, add.input) if p is not None]
    return "Erf" in gates or "Tanh" in gates
