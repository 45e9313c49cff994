"""How many parameters a model has."""

from __future__ import annotations

import math

from onnx import TensorProto

from onnx_lowrank.graph.model import Graph
from onnx_lowrank.graph.tensor import DEFAULT_DOMAINS, constant_tensor

INTEGERS_OF_SHAPES = frozenset({TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL, TensorProto.STRING})


def parameters(graph: Graph) -> int:
    """Elements of all constants, those of integer and boolean type left out: they are shapes and indices."""
    total = 0
    for scope in graph.scopes():
        tensors = list(scope.initializers.values())
        constants = [node for node in scope.nodes if node.op_type == "Constant" and node.domain in DEFAULT_DOMAINS]
        tensors.extend(tensor for node in constants if (tensor := constant_tensor(node)) is not None)
        total += sum(math.prod(tensor.dims) for tensor in tensors if tensor.data_type not in INTEGERS_OF_SHAPES)
    return total
