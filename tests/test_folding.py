"""Chains with folded stages: equation, counts, nodes, dynamic sizes, what onnxruntime's optimizer leaves of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from builders import model, value
from chains import outputs, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, helper, numpy_helper

from onnx_lowrank.chain import Chain, Fit, Folded, Stage
from onnx_lowrank.graph.check import inferred_shapes
from onnx_lowrank.graph.layers import layers, shapes_as_trace
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.latency.pieces import chain_key
from onnx_lowrank.layer import Array, Layer, LayerShape, Shape
from onnx_lowrank.micro_model import chain_model
from onnx_lowrank.passes.decompose.network import Link, network
from onnx_lowrank.rewrite import Replacement, layer_name, splice

RNG = np.random.default_rng(11)
MATRIX = LayerShape(1, 12, 20)


def kronecker(shape: LayerShape) -> Chain:
    """Both stages folded, both sides permuted; the first one carries the first axis, the last one the others."""
    sizes = {"s": 3, "t": shape.out // 3, "c": shape.in_ // 5, "d": 5, "r": 2}
    axes = tuple(range(len(shape.kernel)))
    return network("kron", shape, (Link("d", "tr", axes[:1]), Link("cr", "s", axes[1:])), "cd", "st", sizes)


def ring(shape: LayerShape) -> Chain:
    """Only the stage in the middle folded, no side permuted."""
    sizes = {"s": shape.out, "c": shape.in_, "a": 2, "b": 3, "e": 4}
    links = (Link("c", "be"), Link("e", "a", tuple(range(len(shape.kernel)))), Link("ba", "s"))
    return network("ring", shape, links, "c", "s", sizes)


CHAINS = {"kronecker": kronecker, "ring": ring}
every_chain = pytest.mark.parametrize("make", CHAINS.values(), ids=CHAINS.keys())


def random_factors(chain: Chain) -> tuple[Array, ...]:
    return tuple(RNG.standard_normal(stage.weight) / math.sqrt(stage.params / stage.out) for stage in chain.stages)


def one_node(op: str, x: Sequence[int | str], weight: Array, *, bias: Array | None = None, left: bool = False, **more):
    """A model of one node, x -> y."""
    tensors = {"w": weight.astype(np.float32)} | ({} if bias is None else {"b": bias.astype(np.float32)})
    operands = ["w", "x"] if left else ["x", "w"]
    node = helper.make_node(op, [*operands, *(["b"] if bias is not None else [])], ["y"], name="node", **more)
    rank = len(x) if op != "MatMul" else max(len(x), weight.ndim) - (len(x) == 1)
    return model([node], [value("x", x)], [value("y", [None] * rank)], tensors)  # pyright: ignore[reportArgumentType]


def only_layer(proto: ModelProto, x: Shape | None = None) -> tuple[Graph, Layer]:
    graph = Graph(proto)
    trace = None if x is None else shapes_as_trace(graph, inferred_shapes(graph, {"x": x}))
    (layer,), kept = layers(graph, trace) if trace is not None else layers(graph, check=False)
    assert not kept
    return graph, layer


def folded(proto: ModelProto, chain: Chain, factors: tuple[Array, ...]) -> ModelProto:
    """The model with the chain in the place of its layer, read without a trace, as `apply` does."""
    graph, layer = only_layer(proto)
    splice(graph, [Replacement(layer, chain, Fit(factors), {"method": chain.method})])
    result = graph.to_proto()
    onnx.checker.check_model(result, full_check=True)
    return result


def optimized(proto: ModelProto, folder: Path) -> ModelProto:
    """What onnxruntime runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(options.optimized_model_filepath)


@st.composite
def convolutions(draw: st.DrawFn):
    """Attributes of a convolution of 10 -> 12 channels, its kernel, and two inputs of other sizes."""
    n = draw(st.integers(1, 3))
    kernel, strides, dilations = (draw(st.tuples(*[st.integers(1, 3)] * n)) for _ in range(3))
    padding: dict[str, object] = {"pads": draw(st.tuples(*[st.integers(0, 2)] * (2 * n))), "dilations": dilations}
    if draw(st.booleans()):
        padding = {"auto_pad": draw(st.sampled_from(["SAME_UPPER", "SAME_LOWER", "VALID"]))}
    feeds = [(draw(st.integers(1, 3)), 10, *(draw(st.integers(7, 9)) for _ in range(n))) for _ in range(2)]
    return kernel, {"strides": strides, **padding}, feeds, draw(st.booleans())


@every_chain
@settings(deadline=None, max_examples=20)
@given(case=convolutions())
def test_convolutions(make, case) -> None:
    """Batch and spatial sizes unknown to the graph; strides, dilations, any padding, with and without bias."""
    kernel, attributes, feeds, bias = case
    shape = LayerShape(1, 12, 10, kernel)
    chain = make(shape)
    factors = random_factors(chain)
    x = ["n", 10, *(f"d{axis}" for axis in range(len(kernel)))]
    b = RNG.standard_normal(12) if bias else None
    proto = one_node("Conv", x, chain.dense(factors)[0], bias=b, **attributes)
    result = folded(proto, chain, factors)
    for size in feeds:
        feed = {"x": RNG.standard_normal(size).astype(np.float32)}
        assert relative_error(outputs(proto, feed)[0], outputs(result, feed)[0]) < 1e-5


PRODUCTS = {
    "MatMul": ("MatMul", ["a", "b", 20], [(2, 3, 20), (1, 7, 20)], {}),
    "MatMul of a vector": ("MatMul", [20], [(20,)], {}),
    "MatMul of a matrix": ("MatMul", ["a", 20], [(4, 20)], {}),
    "MatMul of four axes": ("MatMul", ["a", "b", "c", 20], [(2, 3, 2, 20)], {}),
    "MatMul left": ("MatMul", ["a", 20, "b"], [(2, 20, 5), (1, 20, 3)], {"left": True}),
    "MatMul left of a matrix": ("MatMul", [20, "b"], [(20, 5)], {"left": True}),
    "MatMul left of a vector": ("MatMul", [20], [(20,)], {"left": True}),
    "MatMul left of four axes": ("MatMul", ["a", "b", 20, "c"], [(2, 3, 20, 4)], {"left": True}),
    "MatMul stack of one": ("MatMul", ["a", 20], [(3, 20)], {"stack": True}),
    "Gemm": ("Gemm", ["a", 20], [(3, 20), (1, 20)], {}),
    "Gemm with C": ("Gemm", ["a", 20], [(3, 20)], {"bias": (12,)}),
    "Gemm with C and beta": ("Gemm", ["a", 20], [(3, 20)], {"bias": (1, 12), "beta": 0.5, "alpha": 2.0}),
    "Gemm transB": ("Gemm", ["a", 20], [(3, 20)], {"transB": 1}),
    "Gemm transA": ("Gemm", [20, "a"], [(20, 3)], {"transA": 1, "bias": (12,)}),
    "Gemm left": ("Gemm", [20, "a"], [(20, 3)], {"left": True, "bias": (12, 1)}),
    "Gemm left transB": ("Gemm", ["a", 20], [(3, 20)], {"left": True, "transB": 1}),
}


@every_chain
@pytest.mark.parametrize(("op", "x", "sizes", "options"), PRODUCTS.values(), ids=PRODUCTS.keys())
@pytest.mark.parametrize("opset", [9, 17])
def test_products(make, op: str, x, sizes, options, opset: int) -> None:
    """Leading axes of any number and size, weights on both sides, every flag of Gemm."""
    more = dict(options)
    left, stack, bias = more.pop("left", False), more.pop("stack", False), more.pop("bias", None)
    chain = make(MATRIX)
    factors = random_factors(chain)
    dense = chain.dense(factors)[0] / more.get("alpha", 1.0)
    weight = dense if left or more.get("transB") else dense.T
    weight = weight[None] if stack else weight
    c = None if bias is None else RNG.standard_normal(bias)
    proto = one_node(op, x, weight, bias=c, left=left, **more)
    if opset != 17 and (op != "Gemm" or c is not None):  # C became optional in opset 11
        proto.opset_import[0].version = opset
    result = folded(proto, chain, factors)
    for size in sizes:
        feed = {"x": RNG.standard_normal(size).astype(np.float32)}
        assert relative_error(outputs(proto, feed)[0], outputs(result, feed)[0]) < 1e-5


@every_chain
@pytest.mark.parametrize("op", ["Conv", "MatMul", "Gemm"])
def test_onnxruntime_does_not_fold_the_chain_back(make, op: str, tmp_path: Path) -> None:
    """After optimization there are as many products as stages, with their weights and no others."""
    shape = LayerShape(1, 48, 40, (3, 3) if op == "Conv" else ())
    chain = make(shape)
    factors = random_factors(chain)
    dense = chain.dense(factors)[0]
    x = (2, 40, 8, 8) if op == "Conv" else (4, 40)
    result = optimized(folded(one_node(op, x, dense if op == "Conv" else dense.T), chain, factors), tmp_path)
    products = [
        node for node in result.graph.node if node.op_type in {"Conv", "FusedConv", "MatMul", "FusedMatMul", "Gemm"}
    ]
    assert len(products) == len(chain.stages)
    floats = [t for t in result.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    # Blocked layouts pad channels; the dense weight would be far larger.
    held = sum(math.prod(tensor.dims) for tensor in floats)
    assert held < shape.params
    if op != "Conv":
        assert held == chain.params


@every_chain
@pytest.mark.parametrize("op", ["Conv", "MatMul"])
def test_counts_are_those_of_the_emitted_graph(make, op: str) -> None:
    shape = LayerShape(1, 12, 20, (3, 3)) if op == "Conv" else MATRIX
    chain = make(shape)
    factors = random_factors(chain)
    dense, x = chain.dense(factors)[0], (2, 20, 9, 8) if op == "Conv" else (3, 4, 20)
    more: dict[str, Any] = {"strides": [2, 1], "pads": [1, 0, 2, 1]} if op == "Conv" else {}
    proto = one_node(op, x, dense if op == "Conv" else dense.T, **more)
    _, layer = only_layer(proto, x)
    result = folded(proto, chain, factors)
    inferred = inferred_shapes(Graph(result), {"x": x})
    weights = {tensor.name: math.prod(tensor.dims) for tensor in result.graph.initializer}
    macs = 0
    for node in result.graph.node:
        if node.op_type in {"Conv", "MatMul"}:
            y = [int(d or 0) for d in inferred[node.output[0]]]
            channels = y[1] if op == "Conv" else y[-1]
            macs += math.prod(y) * weights[node.input[1]] // channels
    assert macs == chain.macs(layer)
    assert sum(weights.values()) == chain.params


@every_chain
@pytest.mark.parametrize("op", ["Conv", "MatMul"])
def test_what_is_timed_is_what_is_written(make, op: str) -> None:
    shape = LayerShape(1, 12, 20, (3, 3)) if op == "Conv" else MATRIX
    chain, x = make(shape), (2, 20, 9, 8) if op == "Conv" else (3, 4, 20)
    factors = random_factors(chain)
    dense = chain.dense(factors)[0]
    proto = one_node(op, x, dense if op == "Conv" else dense.T)
    _, layer = only_layer(proto, x)
    timed, written = chain_model(layer, chain, layer.sites[0]), folded(proto, chain, factors)
    assert [n.op_type for n in timed.graph.node] == [n.op_type for n in written.graph.node]
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in timed.graph.initializer}
    for i, stage in enumerate(chain.stages):
        assert held[f"w{i}"].size == stage.params
    (y,) = outputs(timed, {"x": RNG.standard_normal(x).astype(np.float32)})
    assert (
        0.1 < float(np.linalg.norm(y.astype(np.float64)) / math.sqrt(y.size)) < 10
    )  # random weights keep activations at unit scale
    constant = chain_model(layer, chain, layer.sites[0], seed=None)
    assert len({tensor.raw_data[:4] for tensor in constant.graph.initializer}) <= len(chain.stages)


@every_chain
def test_time_spent_counts_for_the_layer(make) -> None:
    chain = make(MATRIX)
    factors = random_factors(chain)
    result = folded(one_node("MatMul", ["a", "b", 20], chain.dense(factors)[0].T), chain, factors)
    running = [node for node in result.graph.node if node.op_type != "Constant"]
    assert {layer_name(node) for node in running} == {"node"}
    assert len({node.name for node in result.graph.node}) == len(result.graph.node)


def test_keys_of_latencies() -> None:
    """Folds are part of the key; what was measured of other chains keeps its key."""
    _, layer = only_layer(one_node("MatMul", [4, 20], np.ones((20, 12))), (4, 20))
    site = layer.sites[0]
    plain = Chain("svd", (Stage(1, 4, 20), Stage(1, 12, 4)), "grc,gsr->gsc")
    assert repr(plain.stages[0]) == "Stage(groups=1, out=4, in_=20, kernel=(), carries=())"
    assert chain_key(layer, plain, site) == "87841e1360d54d30fd3abe58688987634f8f7a4aeeeea87b3e9ce912d0167706"
    one, other = kronecker(MATRIX), kronecker(MATRIX)
    moved = Chain(one.method, (one.stages[0], *(Folded.of((4, 4, 2), (3,), shared=1) for _ in "1")), one.equation)
    assert chain_key(layer, one, site) == chain_key(layer, other, site)
    assert chain_key(layer, one, site) != chain_key(layer, moved, site)


def test_the_equation_says_how_channels_are_cut() -> None:
    chain = kronecker(LayerShape(1, 12, 10, (3, 1)))
    b, a = random_factors(chain)
    assert chain.axes[:3] == ["g", "st", "cd"]
    assert [len(letters) for letters in chain.axes] == [1, 2, 2, 1, 1]
    expected = sum(np.kron(a[0, :, :, q, 0, 0], b[0, :, q, :, 1, 0]) for q in range(2))
    np.testing.assert_allclose(chain.dense((b, a))[0, :, :, 1, 0], expected)
    assert chain.stages[0].copies == 2
    assert chain.stages[1].copies == 4
