"""BatchNormalization after a weight: y = gamma (W x + b - mean) / sqrt(var + epsilon) + beta, one linear map again.

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018,
section 3.2. Left alone: training mode, `spatial=0`, statistics that are not constant, a weight other nodes read too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from onnx import NodeProto, helper

from onnx_lowrank.graph.scope import Scope
from onnx_lowrank.passes.normalize import constants
from onnx_lowrank.passes.normalize.constants import Vector
from onnx_lowrank.passes.normalize.linear import Linear, linear
from onnx_lowrank.passes.normalize.node_rule import NodeRule, attribute, label
from onnx_lowrank.transform import Note

EPSILON = float(np.float32(1e-5))
"""The operator's default: attributes are float32."""


@dataclass(frozen=True)
class FoldBatchNorm(NodeRule):
    """Fold BatchNormalization into the Conv, Gemm or MatMul before it."""

    name: ClassVar[str] = "fold_batch_norm"

    def rewrite(self, scope: Scope, node: NodeProto) -> Note | None:
        """Fold `node`, a BatchNormalization, into its producer."""
        if node.op_type != "BatchNormalization" or scope.sole_consumer(node.input[0]) is not node:
            return None
        layer = linear(scope, scope.producer(node.input[0]))
        statistics = batch_norm_statistics(scope, node)
        if layer is None or statistics is None:
            return None
        if layer.node.op_type == "MatMul" and layer.rank != 2:
            return None  # the channel axis is the second one: the columns of the product only where it is a matrix
        scale, shift = statistics
        if len(scale) != layer.channels or not _absorb(scope, layer, node, scale, shift):
            return None
        return Note(label(node), f"BatchNormalization {label(node)} folded into {label(layer.node)}")


def batch_norm_statistics(scope: Scope, node: NodeProto) -> tuple[Vector, Vector] | None:
    """Scale and shift per channel that a BatchNormalization in inference applies, or None if they are not fixed."""
    if any(node.output[1:]) or attribute(node, "training_mode", 0) or not attribute(node, "spatial", 1):
        return None
    gamma, beta, mean, variance = (constants.value(scope, name) for name in node.input[1:5])
    if gamma is None or beta is None or mean is None or variance is None:
        return None
    scale = gamma / np.sqrt(variance + attribute(node, "epsilon", EPSILON))
    shift = beta - mean * scale
    return (scale, shift) if scale.ndim == 1 and np.isfinite(scale).all() and np.isfinite(shift).all() else None


def _absorb(scope: Scope, layer: Linear, node: NodeProto, scale: Vector, shift: Vector) -> bool:
    if layer.takes_bias:
        if not layer.absorb_after(scale, shift):
            return False
        bypass(scope, layer.last, node)
        return True
    kind = constants.elem_type(scope, layer.weight)
    if not constants.representable(shift, kind) or not layer.absorb_after(scale, np.zeros_like(shift)):
        return False
    bias = scope.add_initializer(f"{label(layer.node)}.bias", shift, kind)
    scope.replace(node, [helper.make_node("Add", [node.input[0], bias], [node.output[0]], name=node.name)])
    return True


def bypass(scope: Scope, before: NodeProto, node: NodeProto) -> None:
    """Drop `node`; its producer `before` writes its output instead."""
    before.output[0] = node.output[0]
    scope.remove(node)
