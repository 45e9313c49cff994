"""One GraphProto under work: the main graph, or the body of an If, Loop or Scan."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, MutableSequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto

from onnx_lowrank.errors import InputError
from onnx_lowrank.graph.messages import bodies, copy_node, husk
from onnx_lowrank.graph.tensor import constant_tensor, is_constant, make_tensor

if TYPE_CHECKING:
    from onnx_lowrank.graph.model import Graph

MapTensor = Callable[[TensorProto], TensorProto]


@dataclass(frozen=True)
class Body:
    """Where a nested scope hangs: attribute `attribute` of `node`, graph number `position` in it."""

    node: NodeProto
    attribute: str
    position: int
    scope: Scope


class Scope:
    """A graph whose nodes and initializers are Python lists and dicts that passes edit.

    Nodes are copies and may be edited in place (call `touch` afterwards); tensor messages are shared with the file's
    message and with snapshots, so they are replaced, never edited.

    Attributes:
        nodes: In topological order.
        initializers: By name.
        proto: Everything else of the message: inputs, outputs, value_info, doc string, metadata, unknown fields.
        path: "" for the main graph, else the owners' names, such as "loop.body/".
        parent: The scope whose node owns this one.
        children: Bodies owned by this scope's nodes.
    """

    def __init__(self, graph: Graph, proto: GraphProto, path: str = "", parent: Scope | None = None) -> None:
        self.graph, self.path, self.parent = graph, path, parent
        self.proto = husk(proto, {"node", "initializer"})
        self.nodes: list[NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self.children: list[Body] = []
        self._cached_index: tuple[dict[str, NodeProto], dict[str, list[NodeProto]]] | None = None
        for tensor in proto.initializer:
            if tensor.name in self.initializers:
                got = f"two initializers called {tensor.name!r}"
                raise InputError(got, "names used once", "export the model again")
            self.initializers[tensor.name] = tensor
        for index, node in enumerate(proto.node):
            self.nodes.append(copy_node(node))
            for attribute, position, body in bodies(node):
                label = f"{path}{node.name or f'#{index}'}.{attribute.name}{position or ''}/"
                inner = Scope(graph, body, label, self)
                self.children.append(Body(self.nodes[-1], attribute.name, position, inner))

    @property
    def inputs(self) -> list[str]:
        """Names of the formal inputs, those with an initializer included."""
        return [value.name for value in self.proto.input]

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs."""
        return [value.name for value in self.proto.output]

    def producer(self, name: str) -> NodeProto | None:
        """The node of this scope that produces tensor `name`, or None."""
        return self._index()[0].get(name)

    def consumers(self, name: str) -> list[NodeProto]:
        """Nodes of this scope that read tensor `name`; one reading it from a nested body counts as the body's owner."""
        return self._index()[1].get(name, [])

    def sole_consumer(self, name: str) -> NodeProto | None:
        """The only node that reads `name`, or None if several do, none does, or it is a graph output."""
        users = self.consumers(name)
        return users[0] if len(users) == 1 and name not in self.outputs else None

    def value_info(self, name: str) -> ValueInfoProto | None:
        """Declared type and shape of a tensor of this scope, or None."""
        values = itertools.chain(self.proto.value_info, self.proto.input, self.proto.output)
        return next((value for value in values if value.name == name), None)

    def constant_source(self, name: str) -> TensorProto | None:
        """The constant tensor behind `name` (initializer or Constant node), here or further out.

        An initializer that is also a formal input counts as constant: see `Graph.hide_initializers`.
        """
        tensor = self.initializers.get(name)
        if tensor is not None:
            return tensor
        node = self.producer(name)
        if node is not None:
            return constant_tensor(node)
        if name in self.inputs or self.parent is None:
            return None
        return self.parent.constant_source(name)

    def array(self, name: str) -> NDArray[np.generic] | None:
        """Value of the constant `name`, or None if it is no constant. External data is read now."""
        tensor = self.constant_source(name)
        return None if tensor is None else self.graph.array(tensor)

    def add_initializer(self, name: str, array: NDArray[np.generic], elem_type: int | None = None) -> str:
        """Add a constant under a free name starting with `name`; returns the name used."""
        free = self.graph.free_name(name)
        self.initializers[free] = make_tensor(free, array, elem_type)
        self.graph.hide_initializers()
        return free

    def replace(self, old: NodeProto, new: Iterable[NodeProto]) -> None:
        """Put `new` nodes in the place of `old`."""
        index = next(i for i, node in enumerate(self.nodes) if node is old)
        self.nodes[index : index + 1] = list(new)
        self.touch()

    def remove(self, node: NodeProto) -> None:
        """Drop one node."""
        self.replace(node, ())

    def rename_input(self, old: str, new: str) -> None:
        """Make every reader of `old` in this scope and its bodies read `new` instead."""
        for node in self.nodes:
            for i, name in enumerate(node.input):
                if name == old:
                    node.input[i] = new
        for body in self.bodies():
            if old not in body.inputs and body.producer(old) is None and old not in body.initializers:
                body.rename_input(old, new)
                for value in body.proto.output:
                    if value.name == old:
                        value.name = new
        self.touch()

    def touch(self) -> None:
        """Forget the producer and consumer index after nodes or their inputs were edited."""
        self._cached_index = None
        if self.parent is not None:
            self.parent.touch()

    def bodies(self) -> list[Scope]:
        """Bodies of the nodes that are still in the graph."""
        alive = {id(node) for node in self.nodes}
        return [body.scope for body in self.children if id(body.node) in alive]

    def captured(self) -> set[str]:
        """Names this scope reads from scopes further out."""
        local = {output for node in self.nodes for output in node.output} | set(self.inputs) | set(self.initializers)
        used = {name for node in self.nodes for name in node.input if name} | set(self.outputs)
        return used.union(*(body.captured() for body in self.bodies())) - local

    def prune(self) -> None:
        """Drop constants nothing reads, their formal inputs included, and value_info of tensors that are gone."""
        while dead := [node for node in self.nodes if is_constant(node) and not any(map(self._read, node.output))]:
            for node in dead:
                self.remove(node)
        formal = set(self.inputs) if self.parent is not None else set[str]()
        unread = {name for name in self.initializers if name not in formal and not self._read(name)}
        for name in unread:
            del self.initializers[name]
        _keep(self.proto.input, lambda value: value.name not in unread)
        alive = {name for node in self.nodes for name in (*node.input, *node.output)}
        alive.update(self.inputs, self.outputs, self.initializers, *(body.captured() for body in self.bodies()))
        _keep(self.proto.value_info, lambda value: value.name in alive)

    def to_proto(self, map_tensor: MapTensor) -> GraphProto:
        """A new message with the current nodes, bodies and initializers, the last passed through `map_tensor`."""
        graph = GraphProto()
        graph.CopyFrom(self.proto)
        nested: dict[int, list[Body]] = {}
        for body in self.children:
            nested.setdefault(id(body.node), []).append(body)
        for node in self.nodes:
            copy = graph.node.add()
            copy.CopyFrom(node)
            for body in nested.get(id(node), []):
                attribute = next(a for a in copy.attribute if a.name == body.attribute)
                slots = attribute.graphs if len(attribute.graphs) else [attribute.g]
                slots[body.position].CopyFrom(body.scope.to_proto(map_tensor))
        graph.initializer.extend(map_tensor(tensor) for tensor in self.initializers.values())
        return graph

    def clone(self, parent: Scope | None = None) -> Scope:
        """A copy whose edits do not show here; tensor messages are shared, Constant nodes are copied."""
        copy = Scope(self.graph, self.proto, self.path, parent)
        copy.nodes = [copy_node(node) for node in self.nodes]
        copy.initializers = dict(self.initializers)
        place = {id(old): new for old, new in zip(self.nodes, copy.nodes, strict=True)}
        copy.children = [
            Body(place[id(body.node)], body.attribute, body.position, body.scope.clone(copy))
            for body in self.children
            if id(body.node) in place
        ]
        return copy

    def _read(self, name: str) -> bool:
        return bool(self.consumers(name)) or name in self.outputs

    def _index(self) -> tuple[dict[str, NodeProto], dict[str, list[NodeProto]]]:
        if self._cached_index is None:
            producers = {output: node for node in self.nodes for output in node.output if output}
            captured: dict[int, list[str]] = {}
            for body in self.children:
                captured.setdefault(id(body.node), []).extend(sorted(body.scope.captured()))
            consumers: dict[str, list[NodeProto]] = {}
            for node in self.nodes:
                for name in (*node.input, *captured.get(id(node), ())):
                    if name:
                        consumers.setdefault(name, []).append(node)
            self._cached_index = (producers, consumers)
        return self._cached_index


def _keep(values: MutableSequence[ValueInfoProto], wanted: Callable[[ValueInfoProto], bool]) -> None:
    """Drop what is not `wanted`, in place; a list that needs no change keeps its bytes."""
    for index in reversed(range(len(values))):
        if not wanted(values[index]):
            del values[index]
