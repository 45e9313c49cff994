"""One Conv, Gemm or MatMul read into canonical form: what its weight is, and how the node around it looks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from onnx import AttributeProto, NodeProto, TensorProto

from onnx_lowrank.graph.scope import Scope
from onnx_lowrank.graph.tensor import DEFAULT_DOMAINS
from onnx_lowrank.graph.weights import FLOAT_TYPES, Constant, constant
from onnx_lowrank.layer import Array, Form, Geometry, LayerShape, Shape

OPERATORS = ("Conv", "Gemm", "MatMul")
OLDEST_OPSET = 7
COMPUTED = "its weight is computed while the model runs"
TWO_ACTIVATIONS = "both operands are activations"

_ACTIVATIONS: dict[str, dict[str, float]] = {
    "Relu": {},
    "Sigmoid": {},
    "Tanh": {},
    "LeakyRelu": {"alpha": 0.01},
    "HardSigmoid": {"alpha": 0.2, "beta": 0.5},
    "Clip": {},
}


@dataclass(frozen=True, eq=False)
class Applied:
    """A weight where one node applies it.

    Args:
        shape: Canonical sizes.
        form: The node.
        weight: The constant as the node gets it.
        flip: Whether the last two axes of the constant are (in, out).
        alpha: Factor absorbed into the weight.
        activation_operand: Position of the other operand.
    """

    shape: LayerShape
    form: Form
    weight: Constant
    flip: bool = False
    alpha: float = 1.0
    activation_operand: int = 0

    def read(self) -> Array:
        """The canonical weight, (groups, out, in, *kernel)."""
        array = self.weight.read()
        array = array.swapaxes(-1, -2) if self.flip else array
        array = array if self.alpha == 1.0 else array * array.dtype.type(self.alpha)
        return np.ascontiguousarray(array.reshape(self.shape.weight))


def applied(scope: Scope, node: NodeProto) -> Applied | str:
    """Read a Conv, Gemm or MatMul, or say in a sentence why it must stay as it is. No values are read."""
    if scope.graph.opset < OLDEST_OPSET:
        return f"opset {scope.graph.opset} is older than {OLDEST_OPSET}"
    found = _convolution(scope, node) if node.op_type == "Conv" else _product(scope, node)
    if isinstance(found, str):
        return found
    if found.weight.elem_type not in FLOAT_TYPES:
        return f"its weight has type {TensorProto.DataType.Name(found.weight.elem_type).lower()}"
    if 0 in found.weight.shape:
        return f"its weight has a dimension of size 0 ({'x'.join(map(str, found.weight.shape))})"
    return found


def _convolution(scope: Scope, node: NodeProto) -> Applied | str:
    weight = constant(scope, node.input[1])
    if not isinstance(weight, Constant):
        return weight or COMPUTED
    out, in_, *kernel = weight.shape
    if len(kernel) > 3:
        return f"it moves over {len(kernel)} axes: at most 3 are supported"
    groups = _ints(node, "group", (1,))[0]
    if groups > 1 and in_ == 1:
        return "depthwise: with one input channel per group there are no channels to mix"
    ones = (1,) * len(kernel)
    geometry = Geometry(
        strides=_ints(node, "strides", ones),
        dilations=_ints(node, "dilations", ones),
        pads=_ints(node, "pads", (0, 0) * len(kernel)),
        auto_pad=next((a.s.decode() for a in node.attribute if a.name == "auto_pad" and a.s), "NOTSET"),
    )
    form = Form(
        op="Conv",
        elem_type=weight.elem_type,
        opset=scope.graph.opset,
        geometry=geometry,
        bias=_has_operand(node, 2),
        activation=_activation(scope, node),
    )
    return Applied(LayerShape(groups, out // groups, in_, tuple(kernel)), form, weight)


def _product(scope: Scope, node: NodeProto) -> Applied | str:
    left, right = constant(scope, node.input[0]), constant(scope, node.input[1])
    if isinstance(left, Constant) and isinstance(right, Constant):
        return "both operands are constants: nothing depends on the input"
    if isinstance(left, Constant):
        side, weight = "left", left
    elif isinstance(right, Constant):
        side, weight = "right", right
    else:
        return right or left or TWO_ACTIVATIONS
    if len(weight.shape) < 2:
        return "its weight is a vector"
    transposes = (_ints(node, "transA", (0,)) == (1,), _ints(node, "transB", (0,)) == (1,))
    mine, other = transposes if side == "left" else transposes[::-1]
    flip = mine != (side == "right")
    batch = weight.shape[:-2]
    if batch and _rank(scope, node.input[0 if side == "right" else 1]) == 1:
        return "a vector times a stack of matrices"
    in_, out = weight.shape[-2:] if flip else weight.shape[:-3:-1]
    form = Form(
        op=node.op_type,
        elem_type=weight.elem_type,
        opset=scope.graph.opset,
        side=side,
        transposed_input=other,
        batch=batch,
        bias=_has_operand(node, 2),
        beta=_float(node, "beta"),
        activation=_activation(scope, node),
    )
    return Applied(
        shape=LayerShape(math.prod(batch), out, in_),
        form=form,
        weight=weight,
        flip=flip,
        alpha=_float(node, "alpha"),
        activation_operand=0 if side == "right" else 1,
    )


def _has_operand(node: NodeProto, index: int) -> bool:
    return len(node.input) > index and bool(node.input[index])


def _rank(scope: Scope, name: str) -> int | None:
    value = scope.value_info(name)
    known = value is not None and value.type.tensor_type.HasField("shape")
    return len(value.type.tensor_type.shape.dim) if value is not None and known else None


def _activation(scope: Scope, node: NodeProto) -> tuple[str, tuple[tuple[str, float], ...]] | None:
    user = scope.sole_consumer(node.output[0])
    if user is None or user.op_type not in _ACTIVATIONS or user.domain not in DEFAULT_DOMAINS:
        return None
    attributes = {**_ACTIVATIONS[user.op_type], **_numbers(user.attribute)}
    if user.op_type == "Clip":
        for label, name in zip(("min", "max"), user.input[1:], strict=False):
            limit = scope.array(name) if name else None
            if name and limit is None:
                return None
            if limit is not None:
                attributes[label] = float(limit.reshape(-1)[0])
    return user.op_type, tuple(sorted(attributes.items()))


def _ints(node: NodeProto, name: str, default: Shape) -> Shape:
    """An attribute of one or more integers."""
    found = next((a for a in node.attribute if a.name == name), None)
    if found is None:
        return default
    return tuple(found.ints) if found.type == AttributeProto.INTS else (found.i,)


def _float(node: NodeProto, name: str) -> float:
    """A scale such as alpha and beta, 1 where it is not given."""
    return next((a.f for a in node.attribute if a.name == name), 1.0)


def _numbers(attributes: Sequence[AttributeProto]) -> dict[str, float]:
    return {a.name: a.f for a in attributes if a.type == AttributeProto.FLOAT}
