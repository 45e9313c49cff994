"""Where nodes run, and what keeps a run from its provider: one that does not load, or nodes that ended elsewhere.

A strict run on an accelerator tolerates nodes on the CPU that compute shapes, and no others. onnxruntime itself keeps
small integer computations that follow a Shape there, because their results are needed there (GetCpuPreferredNodes). A
node is such a computation if all it reads are constants, shapes, loop counters, or what other such nodes make of them:
then it never touches an activation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import GraphProto, ModelProto

from onnx_lowrank.errors import ProviderError
from onnx_lowrank.native_log import native_reason
from onnx_lowrank.target import Target

Label = tuple[str, str]
_SOURCES = frozenset({"Shape", "Size", "Constant"})
_COMPUTE = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "LSTM", "GRU", "RNN"})
_COUNTERS = 2  # a Loop body's first inputs: iteration number and condition


@dataclass(frozen=True)
class Placement:
    """What one provider runs of a model.

    Args:
        provider: Onnxruntime's name.
        nodes: How many, as onnxruntime shared them out: after constants were folded, before it fused what it got.
        operators: How many of each, most frequent first.
    """

    provider: str
    nodes: int
    operators: dict[str, int]


def placements(assigned: Iterable[tuple[str, Label]]) -> tuple[Placement, ...]:
    """Nodes counted by provider and operator, most nodes first.

    Args:
        assigned: Provider, and (operator, name), of every node.
    """
    counts: dict[str, Counter[str]] = {}
    for provider, (op, _) in assigned:
        counts.setdefault(provider, Counter())[op] += 1
    rows = [Placement(name, ops.total(), dict(ops.most_common())) for name, ops in counts.items()]
    return tuple(sorted(rows, key=lambda row: -row.nodes))


def check_placement(
    assigned: Sequence[tuple[str, Label]] | None, model: Path | bytes, target: Target, version: str
) -> tuple[str, ...]:
    """Check that a session runs on its provider, computations of shapes excepted.

    Args:
        assigned: Provider, and (operator, name), of every node; None where onnxruntime does not tell.
        model: As it was opened.
        target: The provider.
        version: Of onnxruntime.

    Returns:
        The nodes that run elsewhere, in words.

    Raises:
        ProviderError: if others do, or nobody can tell.
    """
    if assigned is None:
        raise ProviderError(
            f"onnxruntime {version}, which does not say which nodes {target.provider} takes",
            "onnxruntime 1.24 or newer for a strict run",
            "install one, or go without the check with --allow-fallback",
        )
    elsewhere = [label for name, label in assigned if name != target.provider_name]
    if not elsewhere:
        return ()
    proto = onnx.load(model, load_external_data=False) if isinstance(model, Path) else onnx.load_from_string(model)
    return shapes_only(elsewhere, proto, target)


def shapes_only(elsewhere: Iterable[Label], model: ModelProto, target: Target) -> tuple[str, ...]:
    """Check that the nodes a provider left to another one compute shapes.

    Args:
        elsewhere: (operator, name) of each.
        model: The model as it was opened; weights may be missing from the message.
        target: The provider.

    Returns:
        The nodes, in words.

    Raises:
        ProviderError: if one of them does anything else.
    """
    tolerated = shape_computations(model)
    listed = {label: f"{label[0]} {label[1]}".strip() for label in elsewhere}
    missed = [text for label, text in listed.items() if label not in tolerated]
    if missed:
        more = f" and {len(missed) - 3} more" if len(missed) > 3 else ""
        raise ProviderError(
            f"{len(missed)} nodes that {target.provider} leaves to another provider ({', '.join(missed[:3])}{more})",
            f"every node on {target.provider_name}, computations of shapes excepted",
            "allow it with --allow-fallback, or choose another provider",
        )
    return tuple(listed.values())


def shape_computations(model: ModelProto) -> set[Label]:
    """The nodes that compute shapes. Names need not be unique: a label counts only if all that bear it do."""
    found = [entry for graph in _graphs(model) for entry in _judged(graph, frozenset())]
    return {label for label, computes in found if computes} - {label for label, computes in found if not computes}


def unloadable(target: Target, reason: str) -> ProviderError:
    """The error of a provider that does not load, with onnxruntime's reason."""
    return ProviderError(
        f"provider {target.provider} that does not load here ({native_reason(reason)})",
        f"a working {target.provider_name}",
        "install what it needs (onnx-lowrank doctor says more), or choose another provider",
    )


def check_options(target: Target, known: Collection[str]) -> None:
    """Refuse provider options that the opened provider did not take.

    Args:
        target: With the options.
        known: Those the provider lists. OpenVINO lists none and refuses unknown ones itself, as it loads.

    Raises:
        ProviderError: naming the option.
    """
    unknown = set(target.options) - set(known)
    if unknown and (known or target.provider == "cpu"):
        listed = ", ".join(sorted(known)) or "none: it has no options"
        raise ProviderError(
            f"unknown option {', '.join(sorted(unknown))} of provider {target.provider}", listed, "correct it"
        )


def check_capturable(without_room: Collection[str]) -> None:
    """Refuse a CUDA graph of a model whose outputs have no memory of their own: a replay writes where the capture did.

    Args:
        without_room: Outputs that are allocated anew in every run.

    Raises:
        ProviderError: naming them.
    """
    if without_room:
        raise ProviderError(
            f"a CUDA graph of a model whose outputs {', '.join(without_room)} have another shape than declared",
            "outputs of fixed shape, which a replay can write to",
            "leave out enable_cuda_graph, or give --shape",
        )


def _graphs(model: ModelProto) -> Iterator[GraphProto]:
    yield model.graph
    for function in model.functions:
        yield GraphProto(node=function.node)


def _judged(graph: GraphProto, outer: frozenset[str], counters: int = 0) -> Iterator[tuple[Label, bool]]:
    """Every node, bodies included, and whether it computes shapes; `outer`: what is known of them around the graph."""
    known = outer - {value.name for value in graph.input}
    known |= {tensor.name for tensor in graph.initializer} | {value.name for value in graph.input[:counters]} | {""}
    for node in graph.node:
        inner = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
        for body in inner:
            yield from _judged(body, known, _COUNTERS if node.op_type == "Loop" else 0)
        source = node.op_type in _SOURCES or known.issuperset(node.input)
        computes = source and not inner and node.op_type not in _COMPUTE
        if computes:
            known |= set(node.output)
        yield (node.op_type, node.name), computes
