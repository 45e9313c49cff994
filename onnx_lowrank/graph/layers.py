"""Every weight-bearing node of a model: as a Layer that can be factored, or kept with a reason in words."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from onnx import NodeProto, TensorProto

from onnx_lowrank.errors import InputError
from onnx_lowrank.graph.applied import OPERATORS, Applied, applied
from onnx_lowrank.graph.behind import feeds_convolution
from onnx_lowrank.graph.keys import keyed_nodes
from onnx_lowrank.graph.macs import node_macs
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.graph.refused import refusal
from onnx_lowrank.graph.scope import Scope
from onnx_lowrank.graph.tensor import DEFAULT_DOMAINS
from onnx_lowrank.graph.weights import Constant, constant
from onnx_lowrank.layer import Kept, Layer, NodeShapes, Shape, Site, Trace

NEVER_RAN = "its shapes are unknown: it never ran on the given inputs"
ALL_ZERO = "its weight is all zeros"
TOO_LARGE = "its weights reach {most:.3g}: squares of such numbers overflow in {kind}"


@dataclass(frozen=True, eq=False)
class _Node:
    """A node under inspection."""

    scope: Scope
    proto: NodeProto
    key: str
    shapes: Sequence[NodeShapes] | None


def layers(graph: Graph, trace: Trace | None = None, *, check: bool = True) -> tuple[list[Layer], list[Kept]]:
    """Read every weight-bearing node of every scope.

    Nodes that apply the same weight in the same way become one layer, so that the weight stays shared.

    Args:
        graph: The model, functions inlined.
        trace: Shapes each node met, by key (see `keys.traceable`). Nodes without an entry are kept. None: nothing is
            known, no node is kept for that, and layers have no sites: enough to realise a plan.
        check: Read all weights once, to keep those that are all zero or too large to be factored.

    Returns:
        Layers, and the nodes that stay as they are, both in graph order; each weight-bearing node is in one of them.

    Raises:
        InputError: if `check` and a weight holds NaN or infinity.
    """
    groups: dict[Hashable, list[tuple[_Node, Applied]]] = {}
    kept: list[Kept] = []
    for scope, proto, key in keyed_nodes(graph):
        node = _Node(scope, proto, key, None if trace is None else trace.get(key, ()))
        found = _read(node)
        if isinstance(found, str):
            kept.append(_kept(node, found))
        elif found is not None:
            groups.setdefault(_sharing(found), []).append((node, found))
    made: list[Layer] = []
    for members in groups.values():
        layer = _layer(members)
        reason = _unfit(layer) if check else None
        if reason is None:
            made.append(layer)
        else:
            kept.extend(_kept(node, reason) for node, _ in members)
    order = {key: position for position, (_, _, key) in enumerate(keyed_nodes(graph))}
    return made, sorted(kept, key=lambda entry: order[entry.key])


def shapes_as_trace(graph: Graph, shapes: Mapping[str, Sequence[int | str | None]]) -> dict[str, list[NodeShapes]]:
    """A trace from inferred shapes, for a model that cannot be run: one execution of every node whose shapes are known.

    Args:
        graph: The model.
        shapes: Tensor name -> shape; entries that hold anything but numbers are ignored.
    """
    known = {name: tuple(d for d in dims if isinstance(d, int)) for name, dims in shapes.items()}
    known = {name: dims for name, dims in known.items() if len(dims) == len(shapes[name])}
    found: dict[str, list[NodeShapes]] = {}
    for scope, node, key in keyed_nodes(graph):
        local = {name: known.get(name, _constant_shape(scope, name)) for name in (*node.input, *node.output) if name}
        if all(shape is not None for shape in local.values()):
            inputs = tuple(local[name] or () for name in node.input if name)
            found[key] = [NodeShapes(inputs, tuple(local[name] or () for name in node.output if name))]
    return found


def _constant_shape(scope: Scope, name: str) -> Shape | None:
    tensor = scope.constant_source(name)
    return None if tensor is None else tuple(tensor.dims)


def _read(node: _Node) -> Applied | str | None:
    """What a node is: a factorable weight, a sentence for one that is kept, None for nodes without a weight."""
    sentence = refusal(node.proto)
    if sentence is not None:
        return sentence
    if node.proto.op_type not in OPERATORS or node.proto.domain not in DEFAULT_DOMAINS:
        return None
    found = applied(node.scope, node.proto)
    return found if isinstance(found, str) else _misfit(found, node.shapes) or found


def _misfit(found: Applied, traced: Sequence[NodeShapes] | None) -> str | None:
    """Why a weight cannot be factored at the shapes it met."""
    if traced is None:
        return None
    if not traced:
        return NEVER_RAN
    if any(0 in (*sum(s.input_shapes, ()), *sum(s.output_shapes, ())) for s in traced):
        return "an input or output has a dimension of size 0"
    if found.form.batch and any(len(s.input_shapes[found.activation_operand]) == 1 for s in traced):
        return "a vector times a stack of matrices"
    return None


def _sharing(found: Applied) -> Hashable:
    """Equal for nodes whose chains can share their factors."""
    form = replace(found.form, bias=False, beta=1.0, activation=None)
    return (*found.weight.identity, found.shape, form, found.flip, found.alpha)


def _layer(members: Sequence[tuple[_Node, Applied]]) -> Layer:
    first, found = members[0]
    sites = [
        Site(
            node=node.key,
            input_shape=shapes.input_shapes[use.activation_operand],
            output_shape=shapes.output_shapes[0],
            count=shapes.count,
            before_conv=_before_conv(node, use),
        )
        for node, use in members
        for shapes in node.shapes or ()
    ]
    return Layer(
        key=first.key,
        shape=found.shape,
        form=found.form,
        nodes=tuple(node.key for node, _ in members),
        sites=tuple(sites),
        weight_name=found.weight.name,
        read=found.read,
    )


def _before_conv(node: _Node, use: Applied) -> bool:
    """Whether a convolution has another one behind it; over one axis or three they have no layout of their own."""
    if len(use.shape.kernel) != 2:
        return False
    (y,) = node.proto.output
    fused = node.scope.sole_consumer(y) if use.form.activation else None
    return feeds_convolution(node.scope, fused.output[0] if fused else y)


def _unfit(layer: Layer) -> str | None:
    """What about the values of a weight rules factoring out.

    Where squares of weights overflow, so may factors times activations, and the order of a sum decides over the result.
    """
    weight = layer.read()
    if not np.isfinite(weight).all():
        got = f"NaN or infinity in weight {layer.weight_name!r} of {layer.key!r}"
        raise InputError(got, "finite weights", "repair the model or export it again")
    if not weight.any():
        return ALL_ZERO
    most = max(float(weight.max()), -float(weight.min()))
    if most * most > _largest(layer.form.elem_type, weight.size):
        return TOO_LARGE.format(most=most, kind=TensorProto.DataType.Name(layer.form.elem_type).lower())
    return None


def _largest(elem_type: int, terms: int) -> float:
    """The largest number of a type; of double, that `terms` numbers may sum up to: it is decomposed in double too."""
    match elem_type:
        case TensorProto.DOUBLE:
            return float(np.finfo(np.float64).max) / terms
        case TensorProto.FLOAT16:
            return float(np.finfo(np.float16).max)
        case _:  # bfloat16 reaches as far as float32
            return float(np.finfo(np.float32).max)


def _kept(node: _Node, reason: str) -> Kept:
    constants = {i: constant(node.scope, name) for i, name in enumerate(node.proto.input) if name}
    shapes = {i: found.shape for i, found in constants.items() if isinstance(found, Constant)}
    matrices = {i: shape for i, shape in shapes.items() if len(shape) > 1}
    return Kept(
        key=node.key,
        node=node.proto.name or node.key,
        op=node.proto.op_type,
        reason=reason,
        shape=", ".join("x".join(map(str, shape)) for shape in matrices.values()),
        params=sum(int(np.prod(shape)) for shape in matrices.values()),
        macs=sum(s.count * node_macs(node.proto, s, shapes) for s in node.shapes or ()),
    )
