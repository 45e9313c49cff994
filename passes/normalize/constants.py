"""Constants as passes may use them: read in float64, overwritten only where nobody else looks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from onnx import helper

from onnx_lowrank.graph.scope import Scope
from onnx_lowrank.graph.tensor import make_tensor

Vector = NDArray[np.float64]


def owner(scope: Scope, name: str) -> Scope | None:
    """The scope that holds the constant `name`; None if it is no constant or a caller may replace it (graph input)."""
    here: Scope | None = scope
    while here is not None:
        if name in here.initializers:
            overridable = name in here.inputs and scope.graph.model.ir_version >= 4
            return None if overridable else here
        if name in here.inputs:
            return None
        if here.producer(name) is not None:
            return here if here.constant_source(name) is not None else None
        here = here.parent
    return None


def elem_type(scope: Scope, name: str) -> int:
    """ONNX element type of the constant `name`, 0 if it is none."""
    tensor = scope.constant_source(name)
    return 0 if tensor is None else tensor.data_type


def value(scope: Scope, name: str) -> NDArray[np.float64] | None:
    """The constant `name` in float64, or None where `owner` has none."""
    if not name or owner(scope, name) is None:
        return None
    array = scope.array(name)
    return None if array is None or array.dtype.kind in "OSUb" else array.astype(np.float64)


def used_once(scope: Scope, name: str) -> bool:
    """Whether one node reads the constant `name`, once, in all scopes down to the one that holds it."""
    holder = owner(scope, name)
    here: Scope | None = scope
    while here is not None:
        if len(here.consumers(name)) != 1 or name in here.outputs:
            return False
        if here is holder:
            return True
        here = here.parent
    return False


def representable(array: NDArray[np.float64], kind: int) -> bool:
    """Whether `array` stays finite in the element type `kind`."""
    with np.errstate(over="ignore"):
        rounded = array.astype(helper.tensor_dtype_to_np_dtype(kind)).astype(np.float64)
    return bool(np.isfinite(rounded).all())


def overwrite(scope: Scope, name: str, array: NDArray[np.float64]) -> None:
    """Give the constant `name` another value in the same element type; a Constant node becomes an initializer."""
    holder = owner(scope, name)
    if holder is None:
        raise ValueError(f"{name} is no constant")
    tensor = make_tensor(name, array, elem_type(scope, name))
    node = holder.producer(name)
    if node is not None:
        holder.remove(node)
    holder.initializers[name] = tensor
    scope.graph.hide_initializers()


def per_channel(values: NDArray[np.float64], channels: int, trailing: int, rank: int) -> Vector | None:
    """The vector (channels,) that `values` stand for when broadcast against a tensor with that many channels.

    Args:
        values: A constant operand of an elementwise operator.
        channels: Size of the channel axis of the other operand.
        trailing: Number of axes after the channel axis.
        rank: Lowest rank the other operand can have; a constant of higher rank could change the shape of the result.

    Returns:
        The vector, or None if `values` differ along another axis or would change the shape.
    """
    if values.ndim > rank:
        return None
    shape = (1,) * (trailing + 1 - values.ndim) + values.shape
    axis = len(shape) - 1 - trailing
    if shape[axis] not in {1, channels} or values.size != shape[axis]:
        return None
    return np.broadcast_to(values.reshape(-1), (channels,))
