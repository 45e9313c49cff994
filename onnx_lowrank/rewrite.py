"""From a chain to ONNX nodes: one lowering for the graph that is written and for the small model that is timed.

Conv:            one Conv per stage, its group the stage's groups; stride, dilation and pads on the axes it carries
Gemm, right:     y = (x' F_1^T) F_2^T + beta C        left:  y = F_2 (F_1 x') + beta C
MatMul, right:   y = (x F_1^T) F_2^T                  left:  y = F_2 (F_1 x);  F_i has the batch axes of the constant

Stages that are folded over some modes of the channels: `folding`.

Bias goes to the last stage and nothing stands between stages, so that onnxruntime fuses what follows as before.
onnx-graphsurgeon builds the new nodes; the user's own nodes never pass through it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs
from onnx import NodeProto, helper
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from onnx_lowrank.chain import Chain, Fit, Folded, Stage
from onnx_lowrank.folding import convolution_attributes, folded_tensor, has_folds, lower_folded
from onnx_lowrank.graph.applied import Applied, applied
from onnx_lowrank.graph.bias import bias_slot
from onnx_lowrank.graph.keys import keyed_nodes
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.graph.scope import Scope
from onnx_lowrank.graph.tensor import make_tensor
from onnx_lowrank.layer import Array, Form, Layer

SMALLEST = 1e-20
METADATA_SINCE_IR = 10
STAMP = "onnx_lowrank."


def lower(
    form: Form,
    chain: Chain,
    prefix: str,
    x: str,
    y: str,
    bias: str | None,
    weights: Sequence[str],
) -> list[NodeProto]:
    """The nodes of a chain, in order, named `prefix_0`, `prefix_1`, ...: more than one per stage where it is folded.

    Args:
        form: The node that is replaced.
        chain: The stages.
        prefix: Start of the names of nodes and of the tensors between them.
        x: The activation.
        y: The output.
        bias: Conv's bias or Gemm's C, or None.
        weights: Names of the stage weights, laid out by `stage_tensor`.
    """
    if has_folds(chain):
        return lower_folded(form, chain, prefix, x, y, bias, weights)
    last = len(chain.stages) - 1
    tensors = [x, *(f"{prefix}_{i}/out" for i in range(last)), y]
    nodes: list[NodeProto] = []
    for i, stage in enumerate(chain.stages):
        extra = bias if i == last else None
        if form.op == "Gemm" and extra is None and form.opset < 11:
            # C became optional in opset 11.
            extra = f"{prefix}_{i}/zero"
            zero = gs.Node("Constant", f"{extra}/constant", outputs=[gs.Variable(extra)])
            nodes.append(OnnxExporter.export_node(zero))
            nodes[-1].attribute.append(helper.make_attribute("value", make_tensor(extra, np.zeros(1), form.elem_type)))
        operands = [tensors[i], weights[i]] if form.side == "right" else [weights[i], tensors[i]]
        node = gs.Node(
            op=form.op,
            name=f"{prefix}_{i}",
            attrs=_attributes(form, stage, first=i == 0, last=i == last),
            inputs=[gs.Variable(name) for name in (*operands, *([extra] if extra else []))],
            outputs=[gs.Variable(tensors[i + 1])],
        )
        nodes.append(OnnxExporter.export_node(node))
    return nodes


def stage_tensor(form: Form, stage: Stage, factor: Array) -> Array:
    """A stage's weight (groups, out, in, *kernel) as its node wants it."""
    if isinstance(stage, Folded):
        return folded_tensor(form, stage, factor)
    if form.op == "Conv":
        return factor.reshape(stage.groups * stage.out, stage.in_, *stage.kernel)
    matrices = factor.reshape(*form.batch, stage.out, stage.in_)
    # Gemm has a flag for it and keeps the canonical layout.
    return matrices.swapaxes(-1, -2) if form.op == "MatMul" and form.side == "right" else matrices


def flushed(factor: Array) -> tuple[Array, int]:
    """`factor` with values below 1e-20 set to zero, and how many were not zero before.

    Denormals make a convolution more than ten times slower, and nothing that small is information.
    """
    tiny = (np.abs(factor) < SMALLEST) & (factor != 0)
    return np.where(tiny, factor.dtype.type(0), factor), int(np.count_nonzero(tiny))


@dataclass(frozen=True, eq=False)
class Replacement:
    """A layer and what takes its place.

    Args:
        layer: Read from the graph that is rewritten.
        chain: Its chain.
        fit: The chain's arrays.
        stamp: What the new nodes say about themselves: metadata from IR version 10 on, else in the doc string.
    """

    layer: Layer
    chain: Chain
    fit: Fit
    stamp: Mapping[str, str]


def stamps(node: NodeProto) -> Iterator[tuple[str, str]]:
    """What a node of ours says about itself, in metadata or, before IR version 10, in the doc string; oldest first."""
    words = [(prop.key, prop.value) for prop in node.metadata_props]
    words += [(key, value) for key, _, value in (word.partition("=") for word in node.doc_string.split())]
    return ((key.removeprefix(STAMP), value) for key, value in words if key.startswith(STAMP))


def layer_name(node: NodeProto) -> str:
    """Name of the layer that a node stands for: the one its chain replaced, be it in several rounds, or its own."""
    name = node.name or next(filter(None, node.output), "")
    methods = "|".join(re.escape(value) for key, value in stamps(node) if key == "method")
    stage = re.fullmatch(rf"(.+?)(/({methods})_\d+(_\d+)?)+", name) if methods else None
    return stage[1] if stage else name


def splice(graph: Graph, replacements: Iterable[Replacement]) -> dict[str, int]:
    """Put chains in the place of every node of their layers, in place; nodes of one layer share its new weights.

    Replacements are taken one by one, so their factors may be made on demand. Weights nothing reads any more leave the
    graph, with the operators that rearranged them.

    Returns:
        Number of denormals flushed, by layer key.
    """
    nodes = {key: (scope, node) for scope, node, key in keyed_nodes(graph)}
    new: dict[int, list[NodeProto]] = {}
    unread: list[tuple[Scope, str]] = []
    count: dict[str, int] = {}
    for replacement in replacements:
        layer, chain = replacement.layer, replacement.chain
        sites = [(*nodes[key], _applied(*nodes[key])) for key in layer.nodes]
        owner, first = sites[0][2].weight.scope, sites[0][1]
        names: list[str] = []
        count[layer.key] = 0
        for i, (stage, factor) in enumerate(zip(chain.stages, replacement.fit.factors, strict=True)):
            array, tiny = flushed(factor)
            label = f"{first.name or first.output[0]}/{chain.method}_{i}/weight"
            names.append(owner.add_initializer(label, stage_tensor(layer.form, stage, array), layer.form.elem_type))
            count[layer.key] += tiny
        for scope, node, use in sites:
            bias = node.input[2] if use.form.bias else None
            if replacement.fit.bias is not None:
                bias = _shifted(scope, node, use, replacement)
            form = replace(use.form, bias=bias is not None)
            lowered = _lowered(graph, node, replace(use, form=form), chain, names, bias)
            new[id(node)] = _stamped(graph, node, lowered, replacement.stamp)
            unread.append((scope, node.input[1 - use.activation_operand]))
    if not new:
        return count  # not even what nobody read before leaves the graph
    _exchange(graph, new)
    while unread:
        unread = _drop(graph, unread)
    graph.prune()
    return count


def _attributes(form: Form, stage: Stage, *, first: bool, last: bool) -> dict[str, object]:
    if form.op == "MatMul":
        return {}
    if form.op == "Gemm":
        attributes: dict[str, object] = {"transB": 1} if form.side == "right" else {}
        if first and form.transposed_input:
            attributes["transA" if form.side == "right" else "transB"] = 1
        if last and form.beta != 1.0:
            attributes["beta"] = form.beta
        return attributes
    return convolution_attributes(form, stage)


def _applied(scope: Scope, node: NodeProto) -> Applied:
    found = applied(scope, node)
    if isinstance(found, str):
        raise ValueError(f"got node {node.name!r} ({found}); expected a node of a layer of this graph")  # noqa: TRY004
    return found


def _shifted(scope: Scope, node: NodeProto, use: Applied, replacement: Replacement) -> str | None:
    """A bias changed as the fit says: its name where the node itself has it; an Add behind the node is edited."""
    slot, change = bias_slot(scope, node, use), replacement.fit.bias
    if slot is None or change is None:
        raise ValueError(f"got a change of bias for node {node.name!r}; expected a node with room for one")
    name = slot.add(change, f"{node.name or node.output[0]}/{replacement.chain.method}/bias", use.form.elem_type)
    if slot.node is node:
        return name
    slot.node.input[slot.operand] = name
    scope.touch()
    return None


def _lowered(
    graph: Graph, node: NodeProto, use: Applied, chain: Chain, names: Sequence[str], bias: str | None
) -> list[NodeProto]:
    """The chain for one node, under names that are free in `graph`."""
    x, y = node.input[use.activation_operand], node.output[0]
    nodes = lower(use.form, chain, f"{node.name or y}/{chain.method}", x, y, bias, names)
    renamed = {name: graph.free_name(name) for new in nodes for name in new.output if name != y}
    for new in nodes:
        new.name = graph.free_name(new.name)
        new.input[:] = [renamed.get(name, name) for name in new.input]
        new.output[:] = [renamed.get(name, name) for name in new.output]
    return nodes


def _stamped(graph: Graph, old: NodeProto, nodes: list[NodeProto], stamp: Mapping[str, str]) -> list[NodeProto]:
    """Carry over what the old node said about itself and add `stamp`."""
    for new in nodes:
        new.doc_string = old.doc_string
        new.metadata_props.extend(old.metadata_props)
        if graph.model.ir_version >= METADATA_SINCE_IR:
            for key, text in stamp.items():
                new.metadata_props.add(key=STAMP + key, value=text)
        elif stamp:
            said = " ".join(f"{STAMP}{key}={text}" for key, text in stamp.items())
            new.doc_string = f"{old.doc_string}\n{said}".lstrip()
    return nodes


def _exchange(graph: Graph, new: Mapping[int, list[NodeProto]]) -> None:
    """Put nodes in the place of others, given by id, in one sweep."""
    for scope in graph.scopes():
        if any(id(node) in new for node in scope.nodes):
            scope.nodes[:] = [after for node in scope.nodes for after in new.get(id(node), [node])]
            scope.touch()


def _drop(graph: Graph, operands: list[tuple[Scope, str]]) -> list[tuple[Scope, str]]:
    """Remove the operators that made `operands`, where nothing reads these any more; returns what they read."""
    dead: dict[int, tuple[Scope, str]] = {}
    for scope, operand in operands:
        at: Scope | None = scope
        while at is not None and at.producer(operand) is None:
            at = at.parent
        node = None if at is None else at.producer(operand)
        if at is not None and node is not None and node.input and not (at.consumers(operand) or operand in at.outputs):
            dead[id(node)] = (at, node.input[0])
    _exchange(graph, {key: [] for key in dead})
    return list(dead.values())
