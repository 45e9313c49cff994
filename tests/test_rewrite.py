"""Lowering: a chain that reproduces the weight reproduces the node, whatever the node's attributes are."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import pytest
from builders import RNG, conv_model, model, product_model, value
from chains import KINDS, exact, outputs, reference, relative_error, replacement, rewritten
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnx_lowrank.chain import Chain
from onnx_lowrank.graph.layers import layers, shapes_as_trace
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.layer import LayerShape
from onnx_lowrank.micro_model import chain_model
from onnx_lowrank.rewrite import flushed, splice

LIMIT = 1e-5


def assert_same(original: ModelProto, kind: str, shape: tuple[int, ...]) -> ModelProto:
    result, count = rewritten(original, kind)
    assert count == 1
    onnx.checker.check_model(result, full_check=True)
    feeds = {"x": RNG.standard_normal(shape).astype(np.float32)}
    assert relative_error(outputs(original, feeds)[0], outputs(result, feeds)[0]) < LIMIT
    return result


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[tuple[int, ...], ModelProto, str]:
    n = draw(st.integers(1, 3))
    axis = st.integers(1, 3)
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    kernel, strides, dilations = (tuple(draw(st.tuples(*[axis] * n))) for _ in range(3))
    auto_pad = draw(st.sampled_from(["NOTSET", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if auto_pad.startswith("SAME"):
        # onnxruntime refuses dilations together with SAME padding.
        dilations = (1,) * n
    attributes: dict[str, Any] = {"strides": strides, "dilations": dilations, "group": groups}
    if auto_pad == "NOTSET":
        attributes["pads"] = draw(st.tuples(*[st.integers(0, 2)] * (2 * n)))
    else:
        attributes["auto_pad"] = auto_pad
    x = (draw(st.integers(1, 2)), groups * draw(st.integers(2, 4)), *(draw(st.integers(7, 9)) for _ in range(n)))
    out = groups * draw(st.integers(1, 4))
    built = conv_model(x, (out, x[1] // groups, *kernel), bias=draw(st.booleans()), **attributes)
    return x, built, draw(st.sampled_from(KINDS))


@settings(deadline=None, max_examples=60)
@given(convolutions())
def test_conv(case: tuple[tuple[int, ...], ModelProto, str]) -> None:
    shape, original, kind = case
    assert_same(original, kind, shape)


@settings(deadline=None, max_examples=40)
@given(
    trans_a=st.booleans(),
    trans_b=st.booleans(),
    left=st.booleans(),
    alpha=st.sampled_from([1.0, 0.5, -2.0]),
    beta=st.sampled_from([1.0, 0.25]),
    c=st.sampled_from([None, (1,), (4,), (3, 1), (3, 4)]),
    opset=st.sampled_from([7, 9, 11, 13, 17]),
    kind=st.sampled_from(["output", "input", "both"]),
)
def test_gemm(trans_a, trans_b, left, alpha, beta, c, opset, kind) -> None:
    a, b = (5, 3) if trans_a else (3, 5), (4, 5) if trans_b else (5, 4)
    x, weight = (b, a) if left else (a, b)
    if c is None and opset < 11:
        c = (1,)
    attributes = {"transA": int(trans_a), "transB": int(trans_b), "alpha": alpha, "beta": beta}
    original = product_model("Gemm", x, weight, left=left, c=c, opset=opset, **attributes)
    assert_same(original, kind, x)


@pytest.mark.parametrize("kind", ["output", "input", "both"])
@pytest.mark.parametrize(
    ("x", "weight", "left"),
    [
        ((3, 5), (5, 4), False),
        ((5,), (5, 4), False),
        ((2, 3, 5), (5, 4), False),
        ((2, 6, 3, 5), (6, 5, 4), False),
        ((3, 5), (6, 5, 4), False),
        ((2, 3, 5), (1, 5, 4), False),
        ((1, 3, 5), (2, 3, 5, 4), False),
        ((5, 3), (4, 5), True),
        ((5,), (4, 5), True),
        ((2, 6, 5, 3), (6, 4, 5), True),
        ((5, 3), (2, 2, 4, 5), True),
    ],
)
def test_matmul(x, weight, left, kind) -> None:
    assert_same(product_model("MatMul", x, weight, left=left), kind, x)


@pytest.mark.parametrize("opset", range(7, 23))
def test_every_opset(opset) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["a"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["a"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "g", "c"], ["h"], name="gemm"),
        helper.make_node("MatMul", ["h", "m"], ["y"], name="matmul"),
    ]
    weights = {
        "k": RNG.standard_normal((6, 3, 3, 3)).astype(np.float32),
        "g": RNG.standard_normal((6, 5)).astype(np.float32),
        "c": RNG.standard_normal(5).astype(np.float32),
        "m": RNG.standard_normal((5, 4)).astype(np.float32),
    }
    original = model(nodes, [value("x", ["n", 3, 8, 8])], [value("y", ["n", 4])], weights, opset)
    result, count = rewritten(original)
    assert count == 3
    onnx.checker.check_model(result, full_check=True)
    assert result.opset_import == original.opset_import
    feeds = {"x": RNG.standard_normal((2, 3, 8, 8)).astype(np.float32)}
    assert relative_error(outputs(original, feeds)[0], outputs(result, feeds)[0]) < LIMIT


@pytest.mark.parametrize(
    ("elem_type", "limit"),
    [(TensorProto.FLOAT16, 1e-2), (TensorProto.DOUBLE, 1e-12), (TensorProto.BFLOAT16, 6e-2)],
)
def test_element_types_are_written_back(elem_type, limit) -> None:
    original = conv_model((1, 4, 6, 6), (5, 4, 3, 3), elem_type=elem_type, opset=22, pads=[1, 1, 1, 1])
    result, _ = rewritten(original, "both")
    assert {tensor.data_type for tensor in result.graph.initializer} == {elem_type}
    onnx.checker.check_model(result, full_check=True)
    dtype = np.float64 if elem_type == TensorProto.DOUBLE else np.float32
    x = RNG.standard_normal((1, 4, 6, 6))

    def run(proto: ModelProto) -> np.ndarray:
        """In float64, on the weights as rounded: the reference has no bfloat16 convolution."""
        wide = ModelProto.FromString(proto.SerializeToString())
        for tensor in wide.graph.initializer:
            array = numpy_helper.to_array(tensor).astype(np.float64)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        return reference(wide, {"x": x.astype(dtype).astype(np.float64)})

    assert relative_error(run(original), run(result)) < limit


@pytest.mark.parametrize(
    ("activation", "attributes", "opset"),
    [
        (None, {}, 17),
        ("Relu", {}, 7),
        ("LeakyRelu", {"alpha": 0.2}, 17),
        ("Clip", {"min": 0.0, "max": 6.0}, 7),
        ("HardSigmoid", {}, 17),
        ("Sigmoid", {}, 17),
    ],
)
def test_the_timed_model_computes_what_the_graph_computes(activation, attributes, opset) -> None:
    """The chain's own random weights, multiplied out and put into the dense one-layer model, give the same outputs."""
    original = conv_model((2, 4, 9, 8), (6, 2, 3, 3), opset=opset, group=2, strides=[2, 1], pads=[1, 0, 2, 1])
    if activation:
        original.graph.node[0].output[0] = "h"
        original.graph.node.append(helper.make_node(activation, ["h"], ["y"], **attributes))
    graph = Graph(original)
    inferred = onnx.shape_inference.infer_shapes(original).graph
    shapes = {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in itertools.chain(inferred.value_info, inferred.input, inferred.output)
    }
    layer = layers(graph, shapes_as_trace(graph, shapes))[0][0]
    for kind in KINDS:
        chain, _ = exact(kind, layer.read())
        timed = chain_model(layer, chain, layer.sites[0])
        onnx.checker.check_model(timed, full_check=True)
        tensors = {t.name: numpy_helper.to_array(t) for t in timed.graph.initializer}
        factors = [tensors[f"w{i}"].reshape(stage.weight) for i, stage in enumerate(chain.stages)]
        dense = chain_model(layer, None, layer.sites[0])
        for tensor in dense.graph.initializer:
            array = chain.dense(factors).reshape(tensor.dims) if tensor.name == "w0" else tensors[tensor.name]
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        feeds = {"x": RNG.standard_normal((2, 4, 9, 8)).astype(np.float32)}
        assert relative_error(outputs(dense, feeds)[0], outputs(timed, feeds)[0]) < LIMIT
        assert [n.op_type for n in dense.graph.node if n.op_type != "Constant"] == [
            "Conv",
            *[activation] * bool(activation),
        ]
        written = rewritten(original, kind)[0]
        same = [(n.op_type, list(n.attribute)) for n in written.graph.node if n.op_type == "Conv"]
        assert same == [(n.op_type, list(n.attribute)) for n in timed.graph.node if n.op_type == "Conv"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 5, 4), (2, 3, 4, 3), (1, 3, 4, 2, 3), (1, 2, 3, 2, 3, 2)])
def test_the_equation_of_a_chain_gives_the_weight_back(shape, kind) -> None:
    weight = RNG.standard_normal(shape)
    chain, factors = exact(kind, weight)
    assert np.allclose(chain.dense(factors), weight)
    assert np.array_equal(Chain.unfactored(LayerShape(shape[0], shape[1], shape[2], shape[3:])).dense([weight]), weight)


def test_denormals_are_flushed() -> None:
    array, count = flushed(np.array([1e-40, -1e-21, 0.0, 1e-19, 3.0], np.float32))
    assert array.tolist() == pytest.approx([0.0, 0.0, 0.0, 1e-19, 3.0])
    assert count == 2
    assert array.dtype == np.float32


@pytest.mark.parametrize("ir_version", [8, 10])
def test_names_and_stamp(ir_version) -> None:
    original = conv_model((1, 3, 6, 6), (4, 3, 3, 3))
    original.ir_version = ir_version
    original.graph.node[0].doc_string = "first"
    if ir_version == 10:
        original.graph.node[0].metadata_props.add(key="from", value="torch")
    graph = Graph(original)
    layer = layers(graph)[0][0]
    splice(graph, [replacement(layer, "output", {"method": "svd", "rank": "4"})])
    result = graph.to_proto()
    assert [node.name for node in result.graph.node] == ["conv/output_0", "conv/output_1"]
    assert [tensor.name for tensor in result.graph.initializer] == [
        "b",
        "conv/output_0/weight",
        "conv/output_1/weight",
    ]
    assert result.graph.node[1].input[2] == "b"
    assert result.ir_version == ir_version
    node = result.graph.node[0]
    if ir_version == 10:
        said = {entry.key: entry.value for entry in node.metadata_props}
        assert said == {"from": "torch", "onnx_lowrank.method": "svd", "onnx_lowrank.rank": "4"}
        assert node.doc_string == "first"
    else:
        assert node.doc_string == "first\nonnx_lowrank.method=svd onnx_lowrank.rank=4"
        assert not node.metadata_props
