"""How large a model is: in parameters, and in bytes on disk."""

from __future__ import annotations

import math
from pathlib import Path

import onnx
from onnx import TensorProto

from onnx_lowrank.graph.external import is_external, region
from onnx_lowrank.graph.messages import tensors
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.graph.tensor import DEFAULT_DOMAINS, constant_tensor

INTEGERS_OF_SHAPES = frozenset({TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL, TensorProto.STRING})
# Models that are together larger than this are opened one after the other: an open session holds its weights again,
# in the kernels' layout.
LARGE_BYTES = 1 << 30


def parameters(graph: Graph) -> int:
    """Elements of all constants, those of integer and boolean type left out: they are shapes and indices."""
    total = 0
    for scope in graph.scopes():
        constants = [node for node in scope.nodes if node.op_type == "Constant" and node.domain in DEFAULT_DOMAINS]
        held = [*scope.initializers.values(), *filter(None, map(constant_tensor, constants))]
        total += sum(math.prod(tensor.dims) for tensor in held if tensor.data_type not in INTEGERS_OF_SHAPES)
    return total


def file_bytes(path: Path) -> int:
    """Bytes of a readable model file and of the external files it names.

    Raises:
        InputError: if a reference in it leaves its folder, or names no file.
    """
    model = onnx.load(path, load_external_data=False)
    files = {region(tensor, path.parent).file for tensor in tensors(model) if is_external(tensor)}
    return sum(file.stat().st_size for file in {path, *files})
