"""Multiply-accumulates of the nodes that stay as they are; those of layers follow from their canonical shape."""

from __future__ import annotations

import math

from onnx import NodeProto

from onnx_lowrank.layer import NodeShapes, Shape

_WEIGHT_OPERAND = {"QLinearConv": 3, "FusedConv": 1, "Conv": 1, "ConvInteger": 1, "ConvTranspose": 1}
_MATRIX = {"MatMul", "MatMulInteger", "QLinearMatMul", "FusedMatMul", "Gemm", "FusedGemm", "MatMulNBits"}


def node_macs(node: NodeProto, shapes: NodeShapes, weights: dict[int, Shape]) -> float:
    """Multiply-accumulates of one execution; 0 where the operator's are not known.

    Args:
        node: Any node.
        shapes: What it met.
        weights: Shapes of its constant operands by position.
    """
    source, result = shapes.input_shapes, shapes.output_shapes
    if not source or not result:
        return 0.0
    op = node.op_type
    if op in _WEIGHT_OPERAND:
        weight = weights.get(_WEIGHT_OPERAND[op], ())
        moved = source[0] if op == "ConvTranspose" else result[0]
        return float(math.prod(moved) * math.prod(weight[1:])) if weight else 0.0
    if op in _MATRIX and source[0]:
        transposed = any(a.name == "transA" and a.i for a in node.attribute)
        inner = source[0][0 if transposed else len(source[0]) - 1]
        return float(math.prod(result[0]) * inner)
    if op in {"LSTM", "GRU", "RNN"}:
        steps = math.prod(source[0][:2])
        return float(steps * sum(math.prod(weights[i]) for i in (1, 2) if i in weights))
    return _einsum(node, source) if op == "Einsum" else 0.0


def _einsum(node: NodeProto, source: tuple[Shape, ...]) -> float:
    equation = next((a.s.decode() for a in node.attribute if a.name == "equation"), "").replace(" ", "")
    terms = equation.split("->")[0].split(",")
    if "." in equation or [len(term) for term in terms] != [len(shape) for shape in source]:
        return 0.0
    sizes = {
        letter: size
        for term, shape in zip(terms, source, strict=True)
        for letter, size in zip(term, shape, strict=True)
    }
    return float(math.prod(sizes.values()))
