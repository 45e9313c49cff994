"""The constant behind a node's operand: an initializer or Constant node, seen through operators that only rearrange it.

Shape and type are known at once; the values are read when they are asked for, so that looking at a model costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper

from onnx_lowrank.graph.model import Graph
from onnx_lowrank.graph.scope import Scope
from onnx_lowrank.graph.tensor import DEFAULT_DOMAINS, is_constant
from onnx_lowrank.layer import Array, Shape

FLOAT_TYPES = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)
REARRANGING = ("Identity", "Cast", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze")
OVERRIDABLE = "its weight {name!r} is a graph input that a caller may override"

Step = Callable[[NDArray[np.generic]], NDArray[np.generic]]


@dataclass(frozen=True, eq=False)
class Constant:
    """A constant operand.

    Args:
        graph: The graph it was found in.
        scope: The scope that owns the initializer or Constant node.
        tensor: The message that holds the values.
        name: The tensor's name in `scope`.
        path: Name of each rearranging operator and its arguments, from the source on; equal paths give equal values.
        steps: The operators, to be applied in order.
        shape: Shape after all steps.
        elem_type: Element type after all steps.
    """

    graph: Graph
    scope: Scope
    tensor: TensorProto
    name: str
    path: tuple[str, ...]
    steps: tuple[Step, ...]
    shape: Shape
    elem_type: int

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal for operands that hold the same values of the same tensor."""
        return (id(self.scope), self.name, self.path)

    def read(self) -> Array:
        """The values: float64 for double, float32 for every smaller type."""
        array = self.graph.array(self.tensor)
        for step in self.steps:
            array = step(array)
        return array.astype(np.float64 if self.elem_type == TensorProto.DOUBLE else np.float32, copy=False)


def constant(scope: Scope, name: str) -> Constant | str | None:
    """The constant behind operand `name` as `scope` sees it.

    Returns:
        A constant; or the sentence that says why a tensor that looks like a weight cannot be one; or None for an
        activation.
    """
    trail: list[tuple[Scope, NodeProto]] = []
    while True:
        owner = _owner(scope, name)
        if owner is None:
            return None
        node = owner.producer(name)
        if node is None or is_constant(node):
            break
        if node.op_type not in REARRANGING or node.domain not in DEFAULT_DOMAINS:
            return _computed(owner, node)
        trail.append((owner, node))
        scope, name = owner, node.input[0]
    tensor = owner.constant_source(name)
    if tensor is None:
        return None
    # Before IR version 4 every initializer had to be listed as an input, so there the list says nothing.
    if node is None and name in owner.inputs and (owner.parent or scope.graph.model.ir_version >= 4):
        return OVERRIDABLE.format(name=name)
    found = Constant(scope.graph, owner, tensor, name, (), (), tuple(tensor.dims), tensor.data_type)
    for place, step in reversed(trail):
        after = _rearranged(place, step, found)
        if not isinstance(after, Constant):
            return after
        found = after
    return found


def _owner(scope: Scope, name: str) -> Scope | None:
    at: Scope | None = scope
    while at is not None:
        if at.producer(name) is not None or name in at.initializers:
            return at
        if name in at.inputs:
            return None
        at = at.parent
    return None


def _rearranged(scope: Scope, node: NodeProto, source: Constant) -> Constant | str:
    arguments = _arguments(scope, node)
    step = None if arguments is None else _step(node.op_type, arguments, len(source.shape))
    if arguments is None or step is None:
        return f"its weight is computed by {node.op_type}"
    # A view with strides of zero has the shape of the weight and none of its memory.
    shape = step(np.broadcast_to(np.float32(0), source.shape)).shape
    elem_type = source.elem_type
    if node.op_type == "Cast":
        if source.elem_type not in FLOAT_TYPES:
            kind = TensorProto.DataType.Name(source.elem_type).lower()
            return f"its weight is stored as {kind} and cast to a float when the model runs"
        elem_type = arguments["to"][0]
        step = _cast(helper.tensor_dtype_to_np_dtype(elem_type))
    path = (*source.path, f"{node.op_type}{sorted(arguments.items())}")
    return replace(source, path=path, steps=(*source.steps, step), shape=shape, elem_type=elem_type)


def _computed(scope: Scope, node: NodeProto) -> str | None:
    """What to say about the output of another operator: nothing, unless it depends on constants only."""
    if any(scope.constant_source(name) is None for name in node.input if name):
        return None
    return f"its weight {'comes from' if 'Dequantize' in node.op_type else 'is computed by'} {node.op_type}"


def _arguments(scope: Scope, node: NodeProto) -> dict[str, list[int]] | None:
    """Integer attributes and constant integer operands of a rearranging operator, or None if one is not constant."""
    found = {a.name: list(a.ints) if a.ints else [a.i] for a in node.attribute}
    for name in node.input[1:]:
        values = scope.array(name) if name else None
        if name and values is None:
            return None
        if values is not None:
            found["operand"] = [int(v) for v in values.reshape(-1)]
    return found


def _step(op: str, arguments: dict[str, list[int]], ndim: int) -> Step | None:  # noqa: PLR0911 - one return per operator
    match op:
        case "Identity" | "Cast":
            return lambda array: array
        case "Transpose":
            order = arguments.get("perm", list(range(ndim))[::-1])
            return lambda array: array.transpose(order)
        case "Reshape" if "operand" in arguments and not arguments.get("allowzero", [0])[0]:
            wanted = arguments["operand"]
            return lambda array: array.reshape([array.shape[i] if d == 0 else d for i, d in enumerate(wanted)])
        case "Flatten":
            axis = arguments.get("axis", [1])[0]
            return lambda array: array.reshape(int(np.prod(array.shape[:axis])), -1)
        case "Squeeze":
            axes = arguments.get("axes", arguments.get("operand"))
            return lambda array: array.squeeze(None if axes is None else tuple(axes))
        case "Unsqueeze":
            new = tuple(arguments.get("axes", arguments.get("operand", [])))
            return lambda array: np.expand_dims(array, new)
        case _:
            return None


def _cast(dtype: np.dtype[np.generic]) -> Step:
    return lambda array: array.astype(dtype)
