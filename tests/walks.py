"""Networks with every kind of way from input to output, for the tests of walking through them."""

from __future__ import annotations

import numpy as np
from builders import model, value
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper
from roads import node

from onnx_lowrank.calibration.stops import Stop, stops
from onnx_lowrank.graph.layers import layers
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.plan import MEMORY_LIMIT


def weight(*shape: int, seed: int = 0, scale: float = 1.0) -> NDArray[np.float32]:
    """Values that keep activations at unit size."""
    values = np.random.default_rng(seed).standard_normal(shape)
    return (scale * values * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)


def residual(width: int = 12) -> ModelProto:
    """image (N, 3, 8, 8) -> logits (N, 5): a stem, two residual blocks, one with a convolution beside it, a head."""
    weights = {
        "w0": weight(width, 3, 3, 3, seed=0),
        "b0": weight(width, 1, seed=9)[:, 0],
        "w1": weight(width, width, 3, 3, seed=1),
        "w2": weight(width, width, 3, 3, seed=2),
        "w3": weight(width, width, 3, 3, seed=3),
        "w4": weight(width, width, 1, 1, seed=4),
        "f": weight(width, 5, seed=5, scale=2.0),
        "c": weight(5, 1, seed=6)[:, 0],
    }
    pads = {"pads": [1] * 4}
    nodes = [
        node("Conv", "image w0 b0", "a0", "stem", **pads),
        node("Relu", "a0", "h0"),
        node("Conv", "h0 w1", "a1", "one/a", **pads),
        node("Relu", "a1", "h1"),
        node("Conv", "h1 w2", "a2", "one/b", **pads),
        node("Add", "a2 h0", "s1"),
        node("Relu", "s1", "h2"),
        node("Conv", "h2 w4", "a4", "two/beside"),
        node("Conv", "h2 w3", "a3", "two/a", **pads),
        node("Add", "a4 a3", "s2"),
        node("Relu", "s2", "h3"),
        node("GlobalAveragePool", "h3", "p"),
        node("Flatten", "p", "q"),
        node("MatMul", "q f", "m", "head"),
        node("Add", "m c", "logits"),
    ]
    return model(nodes, [value("image", ["N", 3, 8, 8])], [value("logits", ["N", 5])], weights)


def branching() -> ModelProto:
    """Outputs at the input, early and late, an If whose bodies read from outside, one tensor with three readers."""
    weights = {name: weight(6, 6, seed=seed) for seed, name in enumerate(("u", "v", "w", "z", "t"))}
    weights["never"] = np.array(1e9, np.float32)
    branches = [
        helper.make_graph(
            [node("MatMul", "b t", f"inner{op}", f"inside{op}"), node(op, f"inner{op} a", f"r{op}")],
            op,
            [],
            [value(f"r{op}", ["N", 6])],
        )
        for op in ("Add", "Mul")
    ]
    nodes = [
        node("MatMul", "x u", "a", "first"),
        node("Tanh", "a", "early"),
        node("MatMul", "early v", "b", "second"),
        node("ReduceSum", "b", "total", keepdims=0),
        node("Less", "total never", "choice"),
        node("If", "choice", "i", "either", then_branch=branches[0], else_branch=branches[1]),
        node("MatMul", "early w", "d", "third"),
        node("Add", "d i", "e"),
        node("Concat", "e x", "wide", axis=1),
        helper.make_node("Split", ["wide", "halves"], ["left", "right"], axis=1),
        node("MatMul", "left z", "y", "fourth"),
        node("Sub", "y right", "late"),
    ]
    weights["halves"] = np.array([6, 6])  # pyright: ignore[reportArgumentType]
    outputs = [value(name, ["N", 6]) for name in ("early", "e", "y", "late")]
    return model(nodes, [value("x", ["N", 6])], outputs, weights)


def embedding() -> ModelProto:
    """ids (N, T) of whole numbers -> y (N, T, 6), with one layer whose input is the same for every sample."""
    weights = {
        "table": weight(20, 8, seed=0, scale=3.0),
        "w": weight(8, 6, seed=1),
        "p": weight(8, 6, seed=2),
        "v": weight(6, 6, seed=3),
        "steps": np.linspace(0, 1, 8, dtype=np.float32)[None],
    }
    nodes = [
        node("Gather", "table ids", "e"),
        node("MatMul", "e w", "h", "words"),
        node("Sin", "steps", "places"),
        node("MatMul", "places p", "o", "constant"),
        node("Add", "h o", "s"),
        node("Relu", "s", "r"),
        node("MatMul", "r v", "y", "last"),
    ]
    return model(nodes, [value("ids", ["N", "T"], TensorProto.INT64)], [value("y", ["N", "T", 6])], weights)


def stopping(proto: ModelProto) -> tuple[Graph, dict[str, Stop]]:
    """The graph, and the stops of all its layers."""
    graph = Graph(proto)
    return graph, stops(graph, layers(graph)[0], MEMORY_LIMIT)


def sequences(size: int) -> ModelProto:
    """A sequence is made before the second layer and read behind it: it would have to be carried past."""
    nodes = [
        node("MatMul", "x w", "a", "first"),
        node("SplitToSequence", "a", "parts", axis=1),
        node("MatMul", "x v", "b", "second"),
        node("SequenceInsert", "parts b", "more"),
        node("ConcatFromSequence", "more", "y", axis=1),
    ]
    weights = {"w": weight(size, size), "v": weight(size, size, seed=1)}
    return model(nodes, [value("x", ["N", size])], [value("y", ["N", "M"])], weights)
