"""Local functions are written out where they are called, so that the weights inside them are seen like any other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnx_lowrank.graph.inline import inline_functions
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.transform import Note, Pass, PassResult


@dataclass(frozen=True)
class InlineFunctions(Pass):
    """Replace calls of local functions that hold weights by the functions' nodes."""

    name: ClassVar[str] = "inline_functions"

    def run(self, graph: Graph) -> PassResult:
        """Inline every such call."""
        count = inline_functions(graph)
        notes = (Note("", f"{count} local functions with weights in them inlined"),) if count else ()
        return PassResult(bool(count), notes)
