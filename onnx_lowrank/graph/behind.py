"""What reads a layer's output: whether it goes on to a convolution without a change of layout on the way.

onnxruntime's CPU provider keeps 4-D activations in blocks of channels (NCHWc) from one convolution to the next, and
through the operators between them (nchwc_transformer.cc). The output of a chain whose last stage left that layout has
to be brought back into it, that of the layer never had to.
"""

from __future__ import annotations

from onnx import NodeProto

from onnx_lowrank.graph.scope import Scope
from onnx_lowrank.graph.tensor import DEFAULT_DOMAINS

_THROUGH = frozenset(
    # Pad becomes part of the convolution behind it.
    {"Relu", "Sigmoid", "Tanh", "BatchNormalization", "MaxPool", "AveragePool", "Pad", "Add", "Sum", "Mul", "Concat"}
)


def feeds_convolution(scope: Scope, tensor: str) -> bool:
    """Whether `tensor` gets to a convolution through nothing but operators that keep its layout.

    A tensor that something else reads too, or that leaves the graph, is reordered for the layer as for its chains.

    Args:
        scope: Holds its readers.
        tensor: A layer's output, behind the activation that is fused with it.
    """
    open_, seen = [tensor], set[str]()
    while open_:
        name = open_.pop()
        readers = scope.consumers(name)
        if name in seen or name in scope.outputs or not all(_keeps_blocks(scope, node, name) for node in readers):
            continue
        seen.add(name)
        if any(node.op_type == "Conv" for node in readers):
            return True
        open_.extend(node.output[0] for node in readers)
    return False


def _keeps_blocks(scope: Scope, node: NodeProto, name: str) -> bool:
    """Whether `node` reads `name` in the layout of convolutions."""
    if node.domain not in DEFAULT_DOMAINS:
        return False
    if node.op_type == "Conv":
        return name == node.input[0]
    if node.op_type in {"Add", "Sum", "Mul", "Concat"}:  # a constant has no such layout
        return all(scope.constant_source(other) is None for other in node.input)
    return node.op_type in _THROUGH
