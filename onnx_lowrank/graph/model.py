"""The user's model while passes run: protobuf messages in Python lists, never translated into another form.

Node, value and model messages are edited in place or left alone, so whatever a pass does not touch (metadata, doc
strings, custom domains, fields of a future ONNX) is written back bit for bit. Weights kept in external files stay
there until they are read.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, numpy_helper

from onnx_lowrank.graph.external import read_tensor

DEFAULT_DOMAINS = ("", "ai.onnx")


class Scope:
    """One GraphProto: the main graph or the body of an If, Loop or Scan.

    `nodes` and `initializers` are the working copies; `Graph.to_proto` puts them back into messages.
    """

    def __init__(self, graph: Graph, proto: GraphProto, path: str, parent: Scope | None) -> None:
        self.graph, self.path, self.parent = graph, path, parent
        self.nodes: list[NodeProto] = list(proto.node)
        self.initializers: dict[str, TensorProto] = {tensor.name: tensor for tensor in proto.initializer}
        self.proto = proto
        self.children: list[tuple[NodeProto, AttributeProto, GraphProto, Scope]] = []
        for index, node in enumerate(self.nodes):
            for attribute in node.attribute:
                bodies = [attribute.g] if attribute.type == AttributeProto.GRAPH else list(attribute.graphs)
                for number, body in enumerate(bodies):
                    label = f"{path}{node.name or f'#{index}'}.{attribute.name}{number or ''}/"
                    self.children.append((node, attribute, body, Scope(graph, body, label, self)))

    @property
    def inputs(self) -> list[str]:
        """Names of the graph's formal inputs."""
        return [value.name for value in self.proto.input]

    @property
    def outputs(self) -> list[str]:
        """Names of the graph's outputs."""
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
        """The constant tensor behind `name` (initializer that is no input, or Constant node), here or further out."""
        tensor = self.initializers.get(name)
        if tensor is not None:
            return tensor
        node = self.producer(name)
        if node is not None:
            if node.op_type == "Constant" and node.domain in DEFAULT_DOMAINS:
                return _constant_tensor(node)
            return None
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
        tensor = make_tensor(free, array, elem_type)
        self.initializers[free] = tensor
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
        for _, _, _, body in self.children:
            if old not in body.inputs and body.producer(old) is None and old not in body.initializers:
                body.rename_input(old, new)
        self.touch()

    def touch(self) -> None:
        """Forget the producer and consumer index after nodes or their inputs were edited."""
        self._cached_index: tuple[dict[str, NodeProto], dict[str, list[NodeProto]]] | None = None
        if self.parent is not None:
            self.parent.touch()

    def captured(self) -> set[str]:
        """Names this scope reads from scopes further out."""
        local = {output for node in self.nodes for output in node.output} | set(self.inputs) | set(self.initializers)
        used = {name for node in self.nodes for name in node.input if name} | set(self.outputs)
        for node, _, _, body in self.children:
            if any(node is mine for mine in self.nodes):
                used |= body.captured()
        return used - local

    def _index(self) -> tuple[dict[str, NodeProto], dict[str, list[NodeProto]]]:
        cached = getattr(self, "_cached_index", None)
        if cached is None:
            producers = {output: node for node in self.nodes for output in node.output if output}
            consumers: dict[str, list[NodeProto]] = {}
            bodies: dict[int, list[Scope]] = {}
            for node, _, _, body in self.children:
                bodies.setdefault(id(node), []).append(body)
            for node in self.nodes:
                names = [name for name in node.input if name]
                for body in bodies.get(id(node), []):
                    names.extend(sorted(body.captured()))
                for name in names:
                    consumers.setdefault(name, []).append(node)
            cached = self._cached_index = (producers, consumers)
        return cached


@dataclass
class Graph:
    """A model under work.

    Args:
        model: The message that was read; its main graph's nodes and initializers are in `main` while we work.
        folder: Where relative external data locations start; None for a model built in memory.
        main: The main graph.
    """

    model: ModelProto
    folder: Path | None = None
    main: Scope = field(init=False)

    def __post_init__(self) -> None:
        """Open the main graph and its bodies."""
        self.main = Scope(self, self.model.graph, "", None)
        self._names: set[str] | None = None

    @property
    def opset(self) -> int:
        """Version of the default operator set."""
        return next((o.version for o in self.model.opset_import if o.domain in DEFAULT_DOMAINS), 1)

    def scopes(self) -> Iterator[Scope]:
        """The main graph and every body, outer ones first."""
        queue = [self.main]
        while queue:
            scope = queue.pop(0)
            yield scope
            alive = {id(node) for node in scope.nodes}
            queue.extend(body for node, _, _, body in scope.children if id(node) in alive)

    def array(self, tensor: TensorProto) -> NDArray[np.generic]:
        """Value of a tensor message, read from its external file if it lives there."""
        return read_tensor(tensor, self.folder)

    def free_name(self, wanted: str) -> str:
        """`wanted`, or `wanted_1`, `wanted_2`, ...: a tensor and node name not in use anywhere; reserved from now on."""
        if self._names is None:
            self._names = set(self._all_names())
        name, number = wanted, 0
        while name in self._names:
            number += 1
            name = f"{wanted}_{number}"
        self._names.add(name)
        return name

    def prune(self) -> None:
        """Drop initializers no node reads any more, Constant nodes without readers, and value_info of vanished tensors."""
        for scope in reversed(list(self.scopes())):
            _prune_scope(scope)

    def to_proto(self, map_tensor: Callable[[TensorProto], TensorProto] = lambda tensor: tensor) -> ModelProto:
        """A new message with the current nodes and initializers; `map_tensor` may swap weights for references.

        Everything else is copied from the message that was read.
        """
        skeleton = ModelProto()
        skeleton.CopyFrom(_without_graph(self.model))
        skeleton.graph.CopyFrom(_assemble(self.main, map_tensor))
        return skeleton

    def _all_names(self) -> Iterator[str]:
        for scope in self.scopes():
            yield from scope.inputs
            yield from scope.initializers
            yield from (value.name for value in scope.proto.value_info)
            for node in scope.nodes:
                yield node.name
                yield from node.output
                yield from node.input


def make_tensor(name: str, array: NDArray[np.generic], elem_type: int | None = None) -> TensorProto:
    """A tensor message of `elem_type` (default: the array's own), rounded to nearest from the array's type."""
    if elem_type is not None:
        array = array.astype(onnx.helper.tensor_dtype_to_np_dtype(elem_type))
    tensor = numpy_helper.from_array(np.ascontiguousarray(array), name)
    if elem_type is not None:
        tensor.data_type = elem_type
    return tensor


def _constant_tensor(node: NodeProto) -> TensorProto | None:
    for attribute in node.attribute:
        match attribute.name:
            case "value":
                return attribute.t
            case "value_float":
                return numpy_helper.from_array(np.array(attribute.f, np.float32))
            case "value_floats":
                return numpy_helper.from_array(np.array(attribute.floats, np.float32))
            case "value_int":
                return numpy_helper.from_array(np.array(attribute.i, np.int64))
            case "value_ints":
                return numpy_helper.from_array(np.array(attribute.ints, np.int64))
            case _:
                pass
    return None


def _prune_scope(scope: Scope) -> None:
    while True:
        dead = [
            node
            for node in scope.nodes
            if node.op_type == "Constant"
            and node.domain in DEFAULT_DOMAINS
            and not any(scope.consumers(name) or name in scope.outputs for name in node.output)
        ]
        if not dead:
            break
        for node in dead:
            scope.remove(node)
    keep = set(scope.inputs) | set(scope.outputs)
    for name in list(scope.initializers):
        if name not in keep and not scope.consumers(name):
            del scope.initializers[name]
    alive = {name for node in scope.nodes for name in (*node.input, *node.output)} | keep
    kept = [value for value in scope.proto.value_info if value.name in alive]
    if len(kept) < len(scope.proto.value_info):
        del scope.proto.value_info[:]
        scope.proto.value_info.extend(kept)


def _without_graph(model: ModelProto) -> ModelProto:
    bare = ModelProto()
    for descriptor, value in model.ListFields():
        if descriptor.name == "graph":
            continue
        if descriptor.is_repeated:
            getattr(bare, descriptor.name).extend(value)
        elif descriptor.message_type is not None:
            getattr(bare, descriptor.name).CopyFrom(value)
        else:
            setattr(bare, descriptor.name, value)
    return bare


def _assemble(scope: Scope, map_tensor: Callable[[TensorProto], TensorProto]) -> GraphProto:
    for _, _, slot, body in scope.children:
        slot.CopyFrom(_assemble(body, map_tensor))
    graph = GraphProto()
    for descriptor, value in scope.proto.ListFields():
        if descriptor.name in {"node", "initializer"}:
            continue
        if descriptor.is_repeated:
            getattr(graph, descriptor.name).extend(value)
        elif descriptor.message_type is not None:
            getattr(graph, descriptor.name).CopyFrom(value)
        else:
            setattr(graph, descriptor.name, value)
    graph.node.extend(scope.nodes)
    graph.initializer.extend(map_tensor(tensor) for tensor in scope.initializers.values())
    return graph
