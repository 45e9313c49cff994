"""Keys: a name for every node of a model, the same each time the model is read.

A key is the path of the scope and the node's name, or its first output where it has none. Nodes that share a name in
one scope get `name@output`, which is unique because tensors are. Files are never renamed, only the copy that is traced.
"""

from __future__ import annotations

from collections import Counter

from onnx import GraphProto, ModelProto, NodeProto

from onnx_lowrank.graph.messages import bodies
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.graph.scope import MapTensor, Scope

KeyedNode = tuple[Scope, NodeProto, str]


def keyed_nodes(graph: Graph) -> list[KeyedNode]:
    """Every node of every scope with its key, outer scopes first, in graph order."""
    found = [(scope, node, _short(scope, node)) for scope in graph.scopes() for node in scope.nodes]
    count = Counter(short for _, _, short in found)
    return [
        (scope, node, short if count[short] == 1 else f"{short}@{next(filter(None, node.output), '')}")
        for scope, node, short in found
    ]


def traceable(graph: Graph, map_tensor: MapTensor = lambda tensor: tensor) -> ModelProto:
    """A copy of the model in which every node, also in bodies, is named by its key: a profile tells them apart."""
    proto = graph.to_proto(map_tensor)
    _rename(graph.main, proto.graph, {id(node): key for _, node, key in keyed_nodes(graph)})
    return proto


def _short(scope: Scope, node: NodeProto) -> str:
    return scope.path + (node.name or next(filter(None, node.output), node.op_type))


def _rename(scope: Scope, proto: GraphProto, keys: dict[int, str]) -> None:
    for node, copy in zip(scope.nodes, proto.node, strict=True):
        copy.name = keys[id(node)]
        own = [body.scope for body in scope.children if body.node is node]
        for body, (_, _, slot) in zip(own, bodies(copy), strict=True):
            _rename(body, slot, keys)
