"""Constant Mul, Div, Add and Sub after a weight: s (W x + b) + t, with s and t per output channel or scalar."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from onnx import NodeProto

from onnx_lowrank.graph.scope import Scope
from onnx_lowrank.passes.normalize import constants
from onnx_lowrank.passes.normalize.constants import Vector
from onnx_lowrank.passes.normalize.fold_batch_norm import bypass
from onnx_lowrank.passes.normalize.linear import linear
from onnx_lowrank.passes.normalize.node_rule import NodeRule, label
from onnx_lowrank.transform import Note


@dataclass(frozen=True)
class FoldMulAdd(NodeRule):
    """Fold constant Mul, Div, Add and Sub per channel into the Conv, Gemm or MatMul before them."""

    name: ClassVar[str] = "fold_mul_add"

    def rewrite(self, scope: Scope, node: NodeProto) -> Note | None:
        """Fold `node`, an elementwise operator with a constant, into the producer of its other operand."""
        if node.op_type not in {"Mul", "Div", "Add", "Sub"}:
            return None
        for at in (0, 1) if node.op_type in {"Mul", "Add"} else (0,):
            layer = linear(scope, scope.producer(node.input[at]))
            if layer is None or layer.last is node or scope.sole_consumer(layer.output) is not node:
                continue
            affine = constant_affine(scope, node, at, layer.channels, layer.trailing, layer.rank)
            if affine is not None and layer.absorb_after(*affine):
                bypass(scope, layer.last, node)
                return Note(label(node), f"{node.op_type} {label(node)} folded into {label(layer.node)}")
        return None


def constant_affine(
    scope: Scope, node: NodeProto, at: int, channels: int, trailing: int, rank: int
) -> tuple[Vector, Vector] | None:
    """Scale and shift per channel that an elementwise operator applies to its operand `at`; None if not constant."""
    array = constants.value(scope, node.input[1 - at])
    vector = None if array is None else constants.per_channel(array, channels, trailing, rank)
    if vector is None:
        return None
    one, zero = np.ones(channels), np.zeros(channels)
    match node.op_type:
        case "Mul":
            return vector, zero
        case "Div":
            return None if not vector.all() else (1 / vector, zero)
        case "Add":
            return one, vector
        case _:
            return one, -vector
