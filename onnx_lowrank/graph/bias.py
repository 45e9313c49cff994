"""Where a node's bias lives, so that a mean a chain has lost can be given back at no cost.

Conv and Gemm have an operand for it; a MatMul has the constant of the Add that follows, where only that Add reads it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto

from onnx_lowrank.graph.applied import Applied
from onnx_lowrank.graph.scope import Scope
from onnx_lowrank.graph.tensor import DEFAULT_DOMAINS
from onnx_lowrank.graph.weights import Constant, constant


@dataclass(frozen=True, eq=False)
class BiasSlot:
    """One operand of one node that is, or may become, a constant vector added to the layer's output.

    Args:
        scope: The node's scope.
        node: The layer's own node, or the Add behind it.
        operand: Position of the bias.
        shape: What the constant looks like now, or shall look like where there is none.
        scale: Gemm's beta.
    """

    scope: Scope
    node: NodeProto
    operand: int
    shape: tuple[int, ...]
    scale: float = 1.0

    def add(self, change: NDArray[np.floating], label: str, elem_type: int) -> str:
        """Make a constant of the present bias plus `change`, (channels,); the node is not edited.

        Returns:
            The new constant's name.
        """
        old = self._value()
        total = np.asarray(change, np.float64) / self.scale
        total = total.reshape(self.shape) if old is None else old.astype(np.float64) + total.reshape(self.shape)
        return self.scope.add_initializer(label, total, elem_type)

    def inside(self, channels: int) -> NDArray[np.float64]:
        """The part of the bias that the layer's own output holds, (channels,): an Add comes after it."""
        value = None if self.node.op_type == "Add" else self._value()
        return np.zeros(channels) if value is None else value.astype(np.float64).reshape(-1) * self.scale

    def _value(self) -> NDArray[np.generic] | None:
        name = self.node.input[self.operand] if len(self.node.input) > self.operand else ""
        return self.scope.array(name) if name else None


def bias_slot(scope: Scope, node: NodeProto, use: Applied) -> BiasSlot | None:
    """The slot of a layer's node, or None where there is no vector to add to without a new operator.

    Args:
        scope: The node's scope.
        node: Conv, Gemm or MatMul.
        use: The same, read.
    """
    channels = use.shape.groups * use.shape.out
    if use.form.elem_type not in {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16}:
        return None
    if use.form.op == "Conv":
        known = not use.form.bias or _fixed(scope, node.input[2]) is not None
        return BiasSlot(scope, node, 2, (channels,)) if known else None
    if use.form.side == "left" or use.shape.groups > 1:
        return None
    if use.form.op == "Gemm":
        shape = _vector(scope, node.input[2], channels) if use.form.bias else (channels,)
        return None if shape is None or use.form.beta == 0 else BiasSlot(scope, node, 2, shape, use.form.beta)
    add = scope.sole_consumer(node.output[0])
    if add is None or add.op_type != "Add" or add.domain not in DEFAULT_DOMAINS:
        return None
    operand = 1 if add.input[0] == node.output[0] else 0
    shape = _vector(scope, add.input[operand], channels)
    return None if shape is None else BiasSlot(scope, add, operand, shape)


def _vector(scope: Scope, name: str, channels: int) -> tuple[int, ...] | None:
    """Shape of a constant that holds one value per channel on its last axis, else None."""
    value = _fixed(scope, name)
    fits = value is not None and value.ndim >= 1 and value.size == channels == value.shape[-1]
    return value.shape if value is not None and fits else None


def _fixed(scope: Scope, name: str) -> NDArray[np.generic] | None:
    """Value of a constant that no caller may override, else None."""
    return scope.array(name) if isinstance(constant(scope, name), Constant) else None
