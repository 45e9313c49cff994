"""Tensor messages that hold their own data: sizes, arrays and Constant nodes."""

from __future__ import annotations

import math

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, NodeProto, TensorProto, numpy_helper

DEFAULT_DOMAINS = ("", "ai.onnx")
PACKED_BITS = {  # bits per element of the types stored several to a byte; by name, as not every release of onnx has all
    getattr(TensorProto, name): bits
    for bits, names in {
        2: ("INT2", "UINT2"),
        4: ("INT4", "UINT4", "FLOAT4E2M1"),
        6: ("FLOAT6E2M3", "FLOAT6E3M2"),
    }.items()
    for name in names
    if hasattr(TensorProto, name)
}


def make_tensor(name: str, array: NDArray[np.generic], elem_type: int | None = None) -> TensorProto:
    """A tensor message of `elem_type` (default: the array's own), rounded to nearest from the array's type."""
    if elem_type is not None:
        array = array.astype(onnx.helper.tensor_dtype_to_np_dtype(elem_type))
    tensor = numpy_helper.from_array(np.ascontiguousarray(array).reshape(np.shape(array)), name)
    if elem_type is not None:
        tensor.data_type = elem_type
    return tensor


def tensor_bytes(tensor: TensorProto) -> int:
    """Size of a tensor's raw data in bytes, from its type and shape; types below a byte are packed.

    Raises:
        KeyError: if the element type is unknown.
    """
    if tensor.data_type == TensorProto.STRING:
        return sum(map(len, tensor.string_data))
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return -(-math.prod(tensor.dims) * PACKED_BITS.get(tensor.data_type, dtype.itemsize * 8) // 8)


def is_constant(node: NodeProto) -> bool:
    """Whether `node` is the standard Constant operator."""
    return node.op_type == "Constant" and node.domain in DEFAULT_DOMAINS


def constant_tensor(node: NodeProto) -> TensorProto | None:
    """The value of a Constant node; None for other nodes and for strings and sparse tensors."""
    if not is_constant(node):
        return None
    attribute = next((a for a in node.attribute if a.name.startswith("value")), None)
    if attribute is None:
        return None
    match attribute.name:
        case "value":
            return attribute.t if attribute.type == AttributeProto.TENSOR and attribute.HasField("t") else None
        case "value_float" | "value_floats":
            value = attribute.f if attribute.name == "value_float" else attribute.floats
            return numpy_helper.from_array(np.array(value, np.float32))
        case "value_int" | "value_ints":
            value = attribute.i if attribute.name == "value_int" else attribute.ints
            return numpy_helper.from_array(np.array(value, np.int64))
        case _:
            return None
