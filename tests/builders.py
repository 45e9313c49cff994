"""Small ONNX models that tests build in memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

RNG = np.random.default_rng(0)


def value(name: str, shape: Sequence[int | str], elem_type: int = TensorProto.FLOAT) -> ValueInfoProto:
    """A tensor value of a signature; a string is a symbolic dimension."""
    return helper.make_tensor_value_info(name, elem_type, shape)


def model(
    nodes: Sequence[NodeProto],
    inputs: Sequence[ValueInfoProto],
    outputs: Sequence[ValueInfoProto],
    weights: dict[str, NDArray[np.generic]] | None = None,
    opset: int = 17,
    ir_version: int = 8,
) -> ModelProto:
    """A checked model of the default domain."""
    tensors = [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
    graph = helper.make_graph(list(nodes), "test", list(inputs), list(outputs), tensors)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    onnx.checker.check_model(proto, full_check=True)
    return proto
