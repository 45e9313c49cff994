"""What a model takes and returns: names, element types and shapes, some of their dimensions symbolic."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, TensorShapeProto, TypeProto, ValueInfoProto, helper

_ELEM_TYPES = {name.lower(): number for name, number in TensorProto.DataType.items()}

Dim = int | str | None
Feeds = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True)
class TensorSpec:
    """One input or output.

    Args:
        name: The tensor's name in the graph.
        elem_type: ONNX element type (TensorProto.DataType); UNDEFINED for sequences, maps and other non-tensors.
        shape: Sizes; a string is a symbolic dimension, None an unknown one.
    """

    name: str
    elem_type: int
    shape: tuple[Dim, ...]

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """The numpy type a feed of this input has."""
        return helper.tensor_dtype_to_np_dtype(self.elem_type)

    @property
    def is_floating(self) -> bool:
        """Whether the elements are real numbers of any width, bfloat16 included."""
        return TensorProto.DataType.Name(self.elem_type).startswith(("FLOAT", "DOUBLE", "BFLOAT"))

    @property
    def varies(self) -> bool:
        """Whether the file leaves a size open."""
        return not all(isinstance(dim, int) for dim in self.shape)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether `shape` has this rank and agrees with the sizes that are fixed."""
        return len(shape) == len(self.shape) and all(
            not isinstance(dim, int) or dim == size for dim, size in zip(self.shape, shape, strict=True)
        )

    def __str__(self) -> str:
        dims = "x".join("?" if dim is None else str(dim) for dim in self.shape) or "scalar"
        return f"{self.name!r} {TensorProto.DataType.Name(self.elem_type).lower()} {dims}"


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs of a model in graph order; inputs with a default value (initializers) are left out."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def parsed_spec(name: str, type_: str, shape: Sequence[Dim]) -> TensorSpec:
    """From onnxruntime's words: `tensor(float)`, or another type, which has no element type and no shape here."""
    match = re.fullmatch(r"tensor\((\w+)\)", type_)
    elem_type = _ELEM_TYPES.get(match[1], TensorProto.UNDEFINED) if match else TensorProto.UNDEFINED
    return TensorSpec(name, elem_type, tuple(shape) if match else ())


def signature_of(model: ModelProto) -> Signature:
    """The signature of a model; weights may be missing from the message."""
    defaults = {tensor.name for tensor in model.graph.initializer}
    inputs = _specs(value for value in model.graph.input if value.name not in defaults)
    return Signature(inputs, _specs(model.graph.output))


def index_bounds(model: ModelProto) -> dict[str, tuple[int, int]]:
    """Smallest and largest valid value of the inputs that index rows of a constant through Gather (token ids).

    An input is followed through Cast, Identity and reshaping nodes; the smallest table it reaches counts.
    """
    rows = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    origin = {value.name: value.name for value in model.graph.input}
    bounds: dict[str, tuple[int, int]] = {}
    for node in model.graph.node:
        if node.op_type in {"Cast", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand", "Transpose"}:
            if node.input[0] in origin:
                origin[node.output[0]] = origin[node.input[0]]
        elif node.op_type == "Gather" and node.input[1] in origin and rows.get(node.input[0]):
            axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
            name, last = origin[node.input[1]], rows[node.input[0]][axis] - 1
            bounds[name] = (0, min(last, bounds.get(name, (0, last))[1]))
    return bounds


def _specs(values: Iterable[ValueInfoProto]) -> tuple[TensorSpec, ...]:
    return tuple(_spec(value.name, value.type) for value in values)


def _spec(name: str, type_: TypeProto) -> TensorSpec:
    if not type_.HasField("tensor_type"):
        return TensorSpec(name, TensorProto.UNDEFINED, ())
    dims = type_.tensor_type.shape.dim
    return TensorSpec(name, type_.tensor_type.elem_type, tuple(_dim(dim) for dim in dims))


def _dim(dim: TensorShapeProto.Dimension) -> Dim:
    if dim.HasField("dim_value"):
        return dim.dim_value if dim.dim_value >= 0 else None  # some exporters write -1 for unknown
    return dim.dim_param or None
