"""A part of a model as a model of its own: from tensors whose values are at hand to tensors that are wanted."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from onnx_lowrank.graph.model import Graph
from onnx_lowrank.graph.scope import Body, Scope

Uses = Mapping[int, Collection[str]]


def reads(scope: Scope) -> dict[int, list[str]]:
    """Names every node of `scope` reads, by its id: its own inputs and what its bodies take from outside."""
    nested: dict[int, list[str]] = {}
    for body in scope.children:
        nested.setdefault(id(body.node), []).extend(sorted(body.scope.captured()))
    return {id(node): [*filter(None, node.input), *nested.get(id(node), ())] for node in scope.nodes}


def extract(graph: Graph, known: Mapping[str, int], wanted: Sequence[str]) -> ModelProto:
    """The part of the main graph that computes `wanted` from `known` tensors.

    Args:
        graph: The model.
        known: Tensor name -> element type; they become inputs of any shape, where they are needed.
        wanted: They become the outputs, in this order; none of them is in `known`.

    Returns:
        A model whose weights are the graph's own messages: external data stay where they are.
    """
    scope, uses = graph.main, reads(graph.main)
    needed, chosen = set(wanted), list[NodeProto]()
    for node in reversed(scope.nodes):
        if any(name in needed and name not in known for name in node.output):
            chosen.append(node)
            needed.update(uses[id(node)])
    chosen.reverse()
    made = GraphProto(name=scope.proto.name or "part")
    made.input.extend(_any_shape(name, known[name]) for name in sorted(needed & set(known)))
    made.output.extend(ValueInfoProto(name=name) for name in wanted)
    made.initializer.extend(t for name, t in scope.initializers.items() if name in needed and name not in known)
    bodies: dict[int, list[Body]] = {}
    for body in scope.children:
        bodies.setdefault(id(body.node), []).append(body)
    made.sparse_initializer.extend(t for t in scope.proto.sparse_initializer if t.values.name in needed)
    for node in chosen:
        made.node.append(_with_bodies(node, bodies.get(id(node), ())))
    model = ModelProto()
    model.CopyFrom(graph.model)
    model.graph.CopyFrom(made)
    return model


def _any_shape(name: str, elem_type: int) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, elem_type or TensorProto.FLOAT, None)


def _with_bodies(node: NodeProto, bodies: Collection[Body]) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    for body in bodies:
        attribute = next(a for a in copy.attribute if a.name == body.attribute)
        slots = attribute.graphs if len(attribute.graphs) else [attribute.g]
        slots[body.position].CopyFrom(body.scope.to_proto(lambda tensor: tensor))
    return copy
