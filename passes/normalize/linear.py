"""Conv, Gemm and MatMul with a constant weight, seen as y = W x + b with one row of W per output channel.

An affine map per channel on either side of it is absorbed exactly (in exact arithmetic):

    s * (W x + b) + t = (s W) x + (s b + t)            after, s and t over output channels
    W (s * x + t) + b = (W s) x + (W t + b)            before, s and t over input channels

The second line with t != 0 needs every output position to see whole inputs: the zeros a convolution pads with are not
shifted. All sums are taken in float64 and rounded once, to the weight's type.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from onnx_lowrank.graph.scope import Scope
from onnx_lowrank.graph.tensor import DEFAULT_DOMAINS
from onnx_lowrank.passes.normalize import constants
from onnx_lowrank.passes.normalize.constants import Vector
from onnx_lowrank.passes.normalize.node_rule import attribute, attribute_ints, drop_attribute, label

ACTIVATIONS = {"Clip", "Elu", "Erf", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "Relu", "Sigmoid", "Tanh"}
POOLS = {"AveragePool", "MaxPool", "GlobalAveragePool"}
KEEPS_CHANNELS = ACTIVATIONS | POOLS | {"BatchNormalization", "Dropout", "Identity", "Softplus"}
"""Operators whose output has the rank and the number of channels of their first input."""


@dataclass(frozen=True)
class Linear:
    """A weight-bearing node whose weight no other node reads.

    Args:
        scope: Where the node is.
        node: The Conv, Gemm or MatMul.
        add: The Add of a constant after a MatMul, its bias; None elsewhere.
        weight: Name of the weight tensor.
        shape: Its shape.
        bias: Name of the bias tensor, or None.
        rank: Lowest rank the output can have.
    """

    scope: Scope
    node: NodeProto
    add: NodeProto | None
    weight: str
    shape: tuple[int, ...]
    bias: str | None
    rank: int

    @property
    def channels(self) -> int:
        """Output channels."""
        match self.node.op_type:
            case "Conv":
                return self.shape[0]
            case "Gemm":
                return self.shape[0 if attribute(self.node, "transB", 0) else 1]
            case _:
                return self.shape[-1]

    @property
    def trailing(self) -> int:
        """Axes after the channel axis, in input and output."""
        return len(self.shape) - 2 if self.node.op_type == "Conv" else 0

    @property
    def last(self) -> NodeProto:
        """The node that writes the output."""
        return self.add or self.node

    @property
    def output(self) -> str:
        """Name of the output tensor."""
        return self.last.output[0]

    @property
    def takes_bias(self) -> bool:
        """Whether a shift can be absorbed: MatMul has no operand for it."""
        return self.node.op_type != "MatMul" or self.add is not None

    @property
    def in_channels(self) -> int:
        """Channels of the input, over all groups."""
        match self.node.op_type:
            case "Conv":
                return self.shape[1] * attribute(self.node, "group", 1)
            case "Gemm":
                return self.shape[1 if attribute(self.node, "transB", 0) else 0]
            case _:
                return self.shape[-2]

    @property
    def pads_nothing(self) -> bool:
        """Whether every output position sees whole inputs only."""
        return not any(attribute_ints(self.node, "pads")) and attribute(self.node, "auto_pad", "NOTSET") in {
            "NOTSET",
            "VALID",
        }

    def absorb_after(self, scale: Vector, shift: Vector) -> bool:
        """Put y -> scale * y + shift into weight and bias; False, and nothing changed, where that is impossible."""
        if shift.any() and not self.takes_bias:
            return False
        bias = self._bias()
        return self._write(self._weight() * self._along_output(scale), scale * bias + shift)

    def absorb_before(self, scale: Vector, shift: Vector) -> bool:
        """Put x -> scale * x + shift into weight and bias; False, and nothing changed, where that is impossible."""
        weight, bias = self._weight(), self._bias()
        if shift.any():
            if not (self.takes_bias and self.pads_nothing):
                return False
            terms = weight * self._along_input(shift)
            match self.node.op_type:
                case "Conv":
                    bias = bias + terms.sum(axis=tuple(range(1, terms.ndim)))
                case "Gemm":
                    rows = 1 if attribute(self.node, "transB", 0) else 0
                    bias = bias + attribute(self.node, "alpha", 1.0) * terms.sum(axis=rows)
                case _:
                    if terms.ndim > 2:
                        return False
                    bias = bias + terms.sum(axis=0)
        return self._write(weight * self._along_input(scale), bias)

    def _weight(self) -> NDArray[np.float64]:
        array = constants.value(self.scope, self.weight)
        if array is None:
            raise ValueError(f"weight {self.weight} is no constant")
        return array

    def _bias(self) -> Vector:
        """What is added to the output, per channel; Gemm's beta included."""
        if self.bias is None:
            return np.zeros(self.channels)
        array = constants.value(self.scope, self.bias)
        vector = None if array is None else constants.per_channel(array, self.channels, 0, self.rank)
        if vector is None:
            raise ValueError(f"bias {self.bias} is no constant vector")
        return vector * (attribute(self.node, "beta", 1.0) if self.node.op_type == "Gemm" else 1.0)

    def _along_output(self, vector: Vector) -> Vector:
        match self.node.op_type:
            case "Conv":
                return vector.reshape(-1, *(1,) * (len(self.shape) - 1))
            case "Gemm":
                return vector[:, None] if attribute(self.node, "transB", 0) else vector
            case _:
                return vector

    def _along_input(self, vector: Vector) -> Vector:
        match self.node.op_type:
            case "Conv":
                group = attribute(self.node, "group", 1)
                rows = np.repeat(vector.reshape(group, self.shape[1]), self.shape[0] // group, axis=0)
                return rows.reshape(*self.shape[:2], *(1,) * (len(self.shape) - 2))
            case "Gemm":
                return vector if attribute(self.node, "transB", 0) else vector[:, None]
            case _:
                return vector[:, None]

    def _write(self, weight: NDArray[np.float64], bias: Vector) -> bool:
        kind = constants.elem_type(self.scope, self.weight)
        if not (constants.representable(weight, kind) and constants.representable(bias, kind)):
            return False
        constants.overwrite(self.scope, self.weight, weight)
        if self.bias is None and not bias.any():
            return True
        if self.bias is not None and constants.used_once(self.scope, self.bias):
            old = constants.value(self.scope, self.bias)
            constants.overwrite(
                self.scope, self.bias, bias.reshape(old.shape) if old is not None and old.size == bias.size else bias
            )
        else:
            self._attach_bias(self.scope.add_initializer(f"{label(self.node)}.bias", bias, kind))
        if self.node.op_type == "Gemm":
            drop_attribute(self.node, "beta")
        self.scope.touch()
        return True

    def _attach_bias(self, name: str) -> None:
        if self.add is not None:
            self.add.input[list(self.add.input).index(self.bias or "")] = name
            return
        del self.node.input[2:]
        self.node.input.append(name)


def linear(scope: Scope, node: NodeProto | None) -> Linear | None:
    """`node` as a linear map, or None: another operator, a weight or bias that is not constant, or a shared weight.

    An Add of a constant to the output of a MatMul stands for both.
    """
    if node is None or node.domain not in DEFAULT_DOMAINS:
        return None
    if node.op_type == "Add":
        return _matmul_with_bias(scope, node)
    if node.op_type not in {"Conv", "Gemm", "MatMul"}:
        return None
    weight, bias = node.input[1], (node.input[2] if len(node.input) > 2 else "") or None
    shape = _shape(scope, weight)
    if shape is None or len(shape) < 2 or not constants.used_once(scope, weight):
        return None
    rank = _matmul_rank(scope, node, len(shape)) if node.op_type == "MatMul" else len(shape)
    found = Linear(scope, node, None, weight, shape, bias, rank)
    if bias is not None:
        array = constants.value(scope, bias)
        if array is None or constants.per_channel(array, found.channels, 0, found.rank) is None:
            return None
    return found


def extent(scope: Scope, name: str, trailing: int) -> tuple[int, int] | None:
    """Rank of an activation and size of its channel axis, the one with `trailing` axes after it; None if unknown.

    Known where the model declares it, or where operators that keep both lead back to such a place or to a weight.
    """
    while True:
        info = scope.value_info(name)
        if info is not None and info.type.tensor_type.HasField("shape"):
            dims = info.type.tensor_type.shape.dim
            axis = len(dims) - 1 - trailing
            if axis >= 0 and dims[axis].dim_value > 0:
                return len(dims), dims[axis].dim_value
        node = scope.producer(name)
        if node is None or node.domain not in DEFAULT_DOMAINS:
            return None
        shape = _shape(scope, node.input[1]) if node.op_type in {"Conv", "Gemm"} else None
        if shape is not None and trailing == len(shape) - 2:
            return len(shape), shape[0 if node.op_type == "Conv" or attribute(node, "transB", 0) else 1]
        if node.op_type not in KEEPS_CHANNELS:
            return None
        name = node.input[0]


def _declared_rank(scope: Scope, name: str) -> int | None:
    info = scope.value_info(name)
    return len(info.type.tensor_type.shape.dim) if info and info.type.tensor_type.HasField("shape") else None


def _matmul_with_bias(scope: Scope, add: NodeProto) -> Linear | None:
    for at, other in ((0, 1), (1, 0)):
        product = scope.producer(add.input[at])
        if product is None or product.op_type != "MatMul" or scope.sole_consumer(add.input[at]) is not add:
            continue
        found = linear(scope, product)
        array = constants.value(scope, add.input[other])
        if found is None or array is None:
            continue
        if constants.per_channel(array, found.channels, 0, found.rank) is not None:
            return replace(found, add=add, bias=add.input[other])
    return None


def _matmul_rank(scope: Scope, node: NodeProto, weight_rank: int) -> int:
    if weight_rank > 2:
        return weight_rank
    ranks = [_declared_rank(scope, name) for name in (node.input[0], node.output[0])]
    return max((rank for rank in ranks if rank is not None), default=1)


def _shape(scope: Scope, name: str) -> tuple[int, ...] | None:
    tensor = scope.constant_source(name) if constants.owner(scope, name) is not None else None
    return None if tensor is None else tuple(tensor.dims)
