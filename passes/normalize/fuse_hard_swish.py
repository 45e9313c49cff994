"""x * clip(x + 3, 0, 6) / 6, as exporters without HardSwish spell it, with one operator instead of three.

Howard et al., "Searching for MobileNetV3", 2019, section 5.2. Where `HardSigmoid` (opset 6) and one Mul are faster than
Add, Clip, Mul and Div depends on the machine: this pass belongs to those that are timed before they are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from onnx import NodeProto, TensorProto, helper

from onnx_lowrank.graph.scope import Scope
from onnx_lowrank.passes.normalize import constants
from onnx_lowrank.passes.normalize.node_rule import NodeRule, attribute, label
from onnx_lowrank.transform import Note


@dataclass(frozen=True)
class FuseHardSwish(NodeRule):
    """Turn x * clip(x + 3, 0, 6) / 6 into HardSigmoid and Mul, or HardSwish.

    Args:
        form: "hard_sigmoid" (HardSigmoid and, where x is multiplied, Mul) or "hard_swish" (opset 14 and later only;
            below it the other form is used).
    """

    name: ClassVar[str] = "fuse_hard_swish"
    form: Literal["hard_sigmoid", "hard_swish"] = "hard_sigmoid"

    def rewrite(self, scope: Scope, node: NodeProto) -> Note | None:
        """Fuse the pattern that ends at `node`."""
        if node.op_type not in {"Mul", "Div"}:
            return None
        use_swish = self.form == "hard_swish" and scope.graph.opset >= 14
        swish = _match_swish(scope, node)
        if swish is not None:
            already = len(swish[1]) == 1  # HardSigmoid and Mul
            return (
                _replace(scope, node, swish, use_swish=use_swish, multiply=True) if use_swish or not already else None
            )
        gate = _match_scaled_gate(scope, node)
        return None if gate is None else _replace(scope, node, gate, use_swish=False, multiply=False)


ROUNDING: dict[int, float] = {TensorProto.FLOAT: 1e-6, TensorProto.DOUBLE: 1e-6, TensorProto.FLOAT16: 1e-3}
"""How far 6 * (1/6) may be from 1 once 1/6 has been rounded to the type. HardSigmoid takes no other types."""

Match = tuple[str, list[NodeProto]]
"""Name of x and the nodes that the pattern consists of, besides the last one."""


def _match_swish(scope: Scope, last: NodeProto) -> Match | None:
    """(x * clip) / 6, x * (clip / 6) or x * HardSigmoid(x) with slope 1/6, ending at `last`."""
    scaled = _times_sixth(scope, last)
    product = scope.producer(scaled) if scaled else None
    if scaled and product is not None and product.op_type == "Mul" and scope.sole_consumer(scaled) is last:
        for x, name in _both_ways(product):
            match = _match_gate(scope, name, product)
            if match is not None and match[0] == x:
                return x, [*match[1], product]
    if last.op_type != "Mul":
        return None
    for x, name in _both_ways(last):
        gate = scope.producer(name)
        if gate is None or scope.sole_consumer(name) is not last:
            continue
        if gate.op_type == "HardSigmoid" and gate.input[0] == x and _is_sixth_and_half(gate):
            return x, [gate]
        match = _match_scaled_gate(scope, gate)
        if match is not None and match[0] == x:
            return x, [*match[1], gate]
    return None


def _match_scaled_gate(scope: Scope, last: NodeProto) -> Match | None:
    """clip(x + 3, 0, 6) / 6, ending at `last`."""
    name = _times_sixth(scope, last)
    return _match_gate(scope, name, last) if name else None


def _match_gate(scope: Scope, name: str, user: NodeProto) -> Match | None:
    """clip(x + 3, 0, 6), read by `user` only."""
    nodes: list[NodeProto] = []
    low, high = -np.inf, np.inf
    while (node := scope.producer(name)) is not None and scope.sole_consumer(name) is user:
        bound = _bounds(scope, node)
        if bound is None:
            break
        name, inner_low, inner_high = bound
        low, high = min(max(inner_low, low), high), min(max(inner_high, low), high)
        nodes.append(node)
        user = node
    if (low, high) != (0.0, 6.0) or node is None or node.op_type != "Add" or scope.sole_consumer(name) is not user:
        return None
    for x, other in _both_ways(node):
        if _scalar(scope, other) == 3.0:
            return x, [*nodes, node]
    return None


def _both_ways(node: NodeProto) -> tuple[tuple[str, str], tuple[str, str]]:
    """The operands of a binary operator, in both orders."""
    first, second = node.input
    return (first, second), (second, first)


def _bounds(scope: Scope, node: NodeProto) -> tuple[str, float, float] | None:
    """Input and limits of a node that clips, or None."""
    match node.op_type:
        case "Relu":
            return node.input[0], 0.0, np.inf
        case "Clip" if len(node.input) == 1:
            return node.input[0], attribute(node, "min", -np.inf), attribute(node, "max", np.inf)
        case "Clip":
            limits = [_scalar(scope, name) if name else default for name, default in _clip_operands(node)]
            return None if limits[0] is None or limits[1] is None else (node.input[0], limits[0], limits[1])
        case "Max" | "Min" if len(node.input) == 2:
            for x, other in _both_ways(node):
                limit = _scalar(scope, other)
                if limit is not None:
                    return (x, limit, np.inf) if node.op_type == "Max" else (x, -np.inf, limit)
            return None
        case _:
            return None


def _clip_operands(node: NodeProto) -> list[tuple[str, float]]:
    names = [*node.input[1:], "", ""]
    return [(names[0], -np.inf), (names[1], np.inf)]


def _times_sixth(scope: Scope, node: NodeProto) -> str | None:
    """The tensor that `node` divides by 6, or None."""
    if node.op_type == "Div":
        return node.input[0] if _scalar(scope, node.input[1]) == 6.0 else None
    if node.op_type == "Mul":
        for name, other in _both_ways(node):
            factor = _scalar(scope, other)
            if factor is not None and abs(6 * factor - 1) < ROUNDING.get(constants.elem_type(scope, other), 0):
                return name
    return None


def _scalar(scope: Scope, name: str) -> float | None:
    """The constant `name` if it is one number that cannot raise the rank of what it meets."""
    array = constants.value(scope, name)
    return float(array.reshape(())) if array is not None and array.size == 1 and array.ndim <= 1 else None


def _is_sixth_and_half(node: NodeProto) -> bool:
    return abs(6 * attribute(node, "alpha", 0.2) - 1) < 1e-6 and attribute(node, "beta", 0.5) == 0.5


def _replace(scope: Scope, last: NodeProto, match: Match, *, use_swish: bool, multiply: bool) -> Note | None:
    x, inner = match
    name, result = label(last), last.output[0]
    if use_swish:
        new = [helper.make_node("HardSwish", [x], [result], name=name)]
    else:
        gate = scope.graph.free_name(f"{name}.gate") if multiply else result
        sigmoid = helper.make_node("HardSigmoid", [x], [gate], name=gate if multiply else name, alpha=1 / 6, beta=0.5)
        new = [sigmoid, helper.make_node("Mul", [x, gate], [result], name=name)] if multiply else [sigmoid]
    for node in inner:
        scope.remove(node)
    scope.replace(last, new)
    words = " and ".join(node.op_type for node in new)
    return Note(name, f"{len(inner) + 1} nodes up to {last.op_type} {name} replaced by {words}")
