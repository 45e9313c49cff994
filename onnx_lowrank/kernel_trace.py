"""onnxruntime's profile, a Chrome trace: which kernel ran when, for how long, on tensors of which shapes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx_lowrank.layer import NodeShapes, Shape

_KERNEL = "_kernel_time"


@dataclass(frozen=True)
class KernelEvent:
    """One execution of one node, from onnxruntime's profile.

    Args:
        node: Name in the optimized graph.
        op: Operator that ran, after fusion.
        provider: Execution provider it ran on.
        microseconds: Wall clock, with the profiler's own cost in it: attributes, does not measure.
        input_shapes: Shapes of the tensors read; optional inputs left out are missing, prepacked weights too.
        output_shapes: Shapes of the tensors written.
    """

    node: str
    op: str
    provider: str
    microseconds: float
    input_shapes: tuple[Shape, ...]
    output_shapes: tuple[Shape, ...]


def read_events(path: Path) -> list[KernelEvent]:
    """The kernels of a profile file, in order of time; nodes that own a body are listed beside what ran inside them."""
    entries: list[dict[str, Any]] = json.loads(path.read_text())
    return [_event(entry) for entry in entries if entry["name"].endswith(_KERNEL) and "op_name" in entry["args"]]


def shapes_by_node(events: Iterable[KernelEvent]) -> dict[str, list[NodeShapes]]:
    """Node name -> the distinct sets of shapes it ran on, each with its number of runs."""
    counts = Counter((event.node, event.input_shapes, event.output_shapes) for event in events)
    shapes: dict[str, list[NodeShapes]] = {}
    for (node, inputs, outputs), count in counts.items():
        shapes.setdefault(node, []).append(NodeShapes(inputs, outputs, count))
    return shapes


def _event(entry: dict[str, Any]) -> KernelEvent:
    args = entry["args"]
    return KernelEvent(
        node=entry["name"].removesuffix(_KERNEL),
        op=args["op_name"],
        provider=args["provider"],
        microseconds=float(entry["dur"]),
        input_shapes=_shapes(args.get("input_type_shape", [])),
        output_shapes=_shapes(args.get("output_type_shape", [])),
    )


def _shapes(listed: list[dict[str, list[int]]]) -> tuple[Shape, ...]:
    return tuple(tuple(shape) for entry in listed for shape in entry.values())
