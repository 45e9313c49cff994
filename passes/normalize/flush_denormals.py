"""Weights around 1e-40, left over in dead filters, slow every multiplication they meet; they are set to zero.

A sum over fewer than 1e6 such terms with inputs below 1e6 stays under 1e-8: nothing a float32 output shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from onnx_lowrank.graph.model import Graph
from onnx_lowrank.graph.scope import Scope
from onnx_lowrank.graph.tensor import DEFAULT_DOMAINS
from onnx_lowrank.passes.normalize import constants
from onnx_lowrank.passes.normalize.node_rule import attribute, label
from onnx_lowrank.transform import Note, Pass, PassResult

OPERANDS = {"Conv": (1, 2), "ConvTranspose": (1, 2), "Gemm": (0, 1, 2), "MatMul": (0, 1), "LSTM": (1, 2), "GRU": (1, 2)}


@dataclass(frozen=True)
class FlushDenormals(Pass):
    """Set weights below `limit` in absolute value to zero and report the channels that are dead then.

    Args:
        limit: Smallest absolute value that is kept.
    """

    name: ClassVar[str] = "flush_denormals"
    limit: float = 1e-20

    def run(self, graph: Graph) -> PassResult:
        """Flush the constants of every weight-bearing node, each tensor once."""
        notes: list[Note] = []
        for scope in list(graph.scopes()):
            for node in list(scope.nodes):
                if node.domain not in DEFAULT_DOMAINS:
                    continue
                for at in OPERANDS.get(node.op_type, ()):
                    name = node.input[at] if at < len(node.input) else ""
                    tiny = self._flush(scope, name) if name else None
                    if tiny is not None:
                        notes.append(Note(label(node), _sentence(node, name, *tiny)))
        return PassResult(bool(notes), tuple(notes))

    def _flush(self, scope: Scope, name: str) -> tuple[int, NDArray[np.float64]] | None:
        array = constants.value(scope, name)
        if array is None:
            return None
        tiny = (np.abs(array) < self.limit) & (array != 0)
        if not tiny.any():
            return None
        flushed = np.where(tiny, 0.0, array)
        constants.overwrite(scope, name, flushed)
        return int(tiny.sum()), flushed


def _sentence(node: NodeProto, name: str, count: int, array: NDArray[np.float64]) -> str:
    text = f"{count} weights of {name} flushed to zero"
    match node.op_type:
        case "Conv":
            out = 0
        case "ConvTranspose":
            out = 1
        case "MatMul":
            out = array.ndim - 1
        case "Gemm":
            out = 0 if attribute(node, "transB", 0) else 1
        case _:
            return text
    if array.ndim < 2 or name not in node.input[:2]:
        return text
    dead = int((~array.any(axis=tuple(axis for axis in range(array.ndim) if axis != out))).sum())
    return text + (f", {dead} output channels are dead" if dead else "")
