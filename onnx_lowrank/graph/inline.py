"""Inlining of local functions that hold weight-bearing nodes, so that layers are found where they are used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from onnx import FunctionProto, NodeProto, StringStringEntryProto, TensorProto
from onnx.inliner import inline_selected_functions

from onnx_lowrank.graph.messages import bodies
from onnx_lowrank.graph.model import Graph

WEIGHT_BEARING = frozenset({"Conv", "ConvTranspose", "Einsum", "GRU", "Gemm", "LSTM", "MatMul", "RNN"})
_PARKED = "\0parked"

Identifier = tuple[str, str]


def inline_functions(graph: Graph) -> int:
    """Inline every call of a local function that contains, directly or through calls, a weight-bearing node.

    Other functions stay as they are. Weights do not pass through the inliner.

    Returns:
        Number of functions inlined; the graph is unchanged when 0, and all its scopes are new otherwise.
    """
    wanted = _weighty(graph.model.functions)
    if not wanted:
        return 0
    parked: list[TensorProto] = []

    def park(tensor: TensorProto) -> TensorProto:
        parked.append(tensor)
        ticket = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        ticket.data_location = TensorProto.EXTERNAL
        ticket.external_data.append(StringStringEntryProto(key=_PARKED, value=str(len(parked) - 1)))
        return ticket

    graph.reopen(inline_selected_functions(graph.to_proto(park), sorted(wanted)))
    for scope in graph.scopes():
        for name, tensor in scope.initializers.items():
            if tensor.external_data and tensor.external_data[0].key == _PARKED:
                scope.initializers[name] = parked[int(tensor.external_data[0].value)]
    return len(wanted)


def _weighty(functions: Iterable[FunctionProto]) -> set[Identifier]:
    """(domain, name) of the functions that lead to a weight-bearing node."""
    contents = {(f.domain, f.name): list(_deep(f.node)) for f in functions}
    found = {key for key, nodes in contents.items() if any(node.op_type in WEIGHT_BEARING for node in nodes)}
    while True:
        callers = {k for k, nodes in contents.items() if any((n.domain, n.op_type) in found for n in nodes)} - found
        if not callers:
            return found
        found |= callers


def _deep(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    for node in nodes:
        yield node
        for _, _, body in bodies(node):
            yield from _deep(body.node)
