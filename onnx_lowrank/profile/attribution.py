"""Whose time it was: kernels of the optimized graph led back to the nodes of the user's model.

onnxruntime names a kernel after the node it grew from, with something appended ("mm/MatMulAddFusion"), or, in the
blocked layout, after the tensor it writes ("relu_out_nchwc"). A convolution that swallowed the Add and Relu behind it
bears the last one's tensor; it is followed back to the convolution. Stages of a chain are told by
what is stamped on them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from onnx import GraphProto, NodeProto

from onnx_lowrank.kernel_trace import KernelEvent
from onnx_lowrank.profile.model import Change, NodeTime, TimeShare
from onnx_lowrank.rewrite import layer_name

RUNTIME = "(runtime)"
_OWNERS = frozenset({"If", "Loop", "Scan"})  # their time is that of the nodes in their bodies, which are listed too
_FUSED_DEPTH = 4


def attribute(events: Iterable[KernelEvent], graph: GraphProto) -> tuple[NodeTime, ...]:
    """Shares of the user's nodes in the time of `events`, largest first; bodies of `graph` included."""
    producers = {output: node for node in _nodes(graph) for output in node.output if output}
    known = {**producers, **{node.name: node for node in _nodes(graph) if node.name}}
    spent: defaultdict[str, float] = defaultdict(float)
    ops: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for event in events:
        if event.op in _OWNERS:
            continue
        node = _namesake(event.node, known)
        if node is not None:
            node = _swallowed(node, event.op.removeprefix("Fused"), producers) or node
        owner = RUNTIME if node is None or event.op.startswith("Reorder") else node.name or node.output[0]
        spent[owner] += event.microseconds
        ops[owner][event.op] = None
    total = sum(spent.values()) or 1.0
    return tuple(
        NodeTime(name, tuple(ops[name]), spent[name] / total) for name in sorted(spent, key=lambda n: -spent[n])
    )


def by_operator(events: Iterable[KernelEvent], total_ms: float) -> tuple[TimeShare, ...]:
    """Shares of the kernels in the time of `events`, by the operator that ran, largest first."""
    spent: defaultdict[str, float] = defaultdict(float)
    for event in events:
        if event.op not in _OWNERS:
            spent[event.op] += event.microseconds
    total = sum(spent.values()) or 1.0
    return _largest_first({op: microseconds / total for op, microseconds in spent.items()}, total_ms)


def by_layer(times: Iterable[NodeTime], graph: GraphProto, total_ms: float) -> tuple[TimeShare, ...]:
    """Shares of the user's layers, largest first: the stages of a chain count for the layer it replaced."""
    layers = {node.name or node.output[0]: layer_name(node) for node in _nodes(graph) if node.name or node.output}
    shares: defaultdict[str, float] = defaultdict(float)
    for entry in times:
        shares[layers.get(entry.node, entry.node)] += entry.share
    return _largest_first(shares, total_ms)


def changes(before: Iterable[TimeShare], after: Iterable[TimeShare]) -> tuple[Change, ...]:
    """Two models side by side, by name: what took longest before first, then what only the second one has."""
    old, new = ({entry.name: entry for entry in entries} for entries in (before, after))
    return tuple(_change(name, old.get(name), new.get(name)) for name in dict.fromkeys((*old, *new)))


def name_nodes(graph: GraphProto) -> None:
    """Name nodes that have no name after their first output, in place, bodies included."""
    for node in _nodes(graph):
        node.name = node.name or next(filter(None, node.output), "")


def _namesake(kernel: str, known: dict[str, NodeProto]) -> NodeProto | None:
    """The node or tensor with the kernel's name, or with the longest part of it that ends before a separator."""
    kernel = kernel.removeprefix("fused ")
    stops = [len(kernel), *(match.start() for match in reversed(list(re.finditer(r"[^A-Za-z0-9]", kernel))))]
    return next((known[kernel[:stop]] for stop in stops if kernel[:stop] in known), None)


def _swallowed(node: NodeProto, op: str, producers: dict[str, NodeProto]) -> NodeProto | None:
    """The nearest node of type `op` at or before `node`."""
    front = [node]
    for _ in range(_FUSED_DEPTH):
        if match := next((candidate for candidate in front if candidate.op_type == op), None):
            return match
        front = [producers[name] for candidate in front for name in candidate.input if name in producers]
    return None


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    for node in graph.node:
        yield node
        for holder in node.attribute:
            for body in (*([holder.g] if holder.HasField("g") else []), *holder.graphs):
                yield from _nodes(body)


def _largest_first(shares: Mapping[str, float], total_ms: float) -> tuple[TimeShare, ...]:
    ordered = sorted(shares, key=lambda name: -shares[name])
    return tuple(TimeShare(name, shares[name], shares[name] * total_ms) for name in ordered)


def _change(name: str, old: TimeShare | None, new: TimeShare | None) -> Change:
    return Change(
        name=name,
        before_ms=old.ms if old else None,
        after_ms=new.ms if new else None,
        before_share=old.share if old else None,
        after_share=new.share if new else None,
        faster=old.ms / new.ms if old and new and new.ms > 0 else None,
    )
