"""Reading: every weight-bearing node ends as a layer or is kept with a sentence."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from builders import RNG, conv_model, model, product_model, value
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from onnx_lowrank.errors import InputError
from onnx_lowrank.graph.keys import keyed_nodes, traceable
from onnx_lowrank.graph.layers import ALL_ZERO, NEVER_RAN, layers, shapes_as_trace
from onnx_lowrank.graph.macs import node_macs
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.layer import Geometry, LayerShape, NodeShapes


def unchecked(
    nodes: Sequence[NodeProto],
    weights: Mapping[str, NDArray[np.generic]] | None = None,
    domain: str = "com.microsoft",
    opset: int = 17,
) -> ModelProto:
    """A model no checker has seen: operators of other domains have no schema."""
    tensors = [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
    graph = helper.make_graph(nodes, "test", [value("x", [2, 4])], [value("y", [2, 4])], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(domain, 1)])


def weights(*shape: int) -> dict[str, NDArray[np.generic]]:
    return {"w": RNG.standard_normal(shape).astype(np.float32)}


def reason(proto: ModelProto) -> str:
    found, kept = layers(Graph(proto))
    assert not found
    assert len(kept) == 1
    return kept[0].reason


FUSED = "the file was already optimized by onnxruntime: give the model as it was exported"
QUANTIZED = "its weight is quantized: factor the floating-point model first, then quantize"


@pytest.mark.parametrize(
    ("op", "domain", "expected"),
    [
        ("ConvTranspose", "", "transposed convolutions are not factored yet"),
        ("Einsum", "", "Einsum is not factored: export it as MatMul"),
        ("LSTM", "", "recurrent layers are not factored yet"),
        ("GRU", "", "recurrent layers are not factored yet"),
        ("RNN", "", "recurrent layers are not factored yet"),
        ("QLinearConv", "", QUANTIZED),
        ("QLinearMatMul", "", QUANTIZED),
        ("MatMulInteger", "", QUANTIZED),
        ("ConvInteger", "", QUANTIZED),
        ("MatMulNBits", "com.microsoft", f"MatMulNBits of com.microsoft: {QUANTIZED}"),
        ("FusedConv", "com.microsoft", f"FusedConv of com.microsoft: {FUSED}"),
        ("FusedGemm", "com.microsoft", f"FusedGemm of com.microsoft: {FUSED}"),
        ("FusedMatMul", "com.microsoft", f"FusedMatMul of com.microsoft: {FUSED}"),
        ("Attention", "com.microsoft", f"Attention of com.microsoft: {FUSED}"),
        ("Conv", "com.microsoft.nchwc", f"Conv of com.microsoft.nchwc: {FUSED}"),
    ],
)
def test_operators_kept_by_name(op, domain, expected) -> None:
    node = helper.make_node(op, ["x", "w"], ["y"], name="n", domain=domain)
    assert reason(unchecked([node], weights(4, 4), domain or "other")) == expected


def test_operators_of_strangers_are_no_concern_of_ours() -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"], domain="my.own")
    assert layers(Graph(unchecked([node], weights(4, 4, 1, 1), "my.own"))) == ([], [])


def matmul(w: str = "w") -> NodeProto:
    return helper.make_node("MatMul", ["x", w], ["y"], name="n")


def fed_by(op: str, **attributes: Any) -> list[NodeProto]:
    """A MatMul whose weight is what `op` makes of the initializer."""
    operands = ["w"] if op == "Cast" else ["w", "w"]
    return [helper.make_node(op, operands, ["v"], **attributes), matmul("v")]


KEPT = {
    "depthwise: with one input channel per group there are no channels to mix": conv_model(
        (1, 4, 5, 5), (8, 1, 3, 3), group=4
    ),
    "its weight is a vector": product_model("MatMul", (3, 4), (4,)),
    "a vector times a stack of matrices": product_model("MatMul", (4,), (2, 4, 3)),
    "its weight has a dimension of size 0 (0x4)": product_model("MatMul", (3, 0), (0, 4)),
    "both operands are activations": unchecked([matmul("x")]),
    "both operands are constants: nothing depends on the input": unchecked(
        [helper.make_node("MatMul", ["w", "w"], ["y"])], weights(4, 4)
    ),
    "its weight has type int32": unchecked([matmul()], {"w": np.ones((4, 4), np.int32)}),
    ALL_ZERO: unchecked([matmul()], {"w": np.zeros((4, 4), np.float32)}),
    "its weight is computed while the model runs": unchecked([helper.make_node("Conv", ["x", "x"], ["y"])]),
    "its weight is computed by Mul": unchecked(fed_by("Mul"), weights(4, 4)),
    "its weight is computed by Reshape": unchecked(
        [helper.make_node("Reshape", ["w", "x"], ["v"]), matmul("v")], weights(4, 4)
    ),
    "its weight comes from DequantizeLinear": unchecked(fed_by("DequantizeLinear"), weights(4, 4)),
    "its weight is stored as int8 and cast to a float when the model runs": unchecked(
        fed_by("Cast", to=TensorProto.FLOAT), {"w": np.ones((4, 4), np.int8)}
    ),
    "opset 6 is older than 7": unchecked([matmul()], weights(4, 4), opset=6),
    "it moves over 4 axes: at most 3 are supported": unchecked(
        [helper.make_node("Conv", ["x", "w"], ["y"])], weights(2, 2, 1, 1, 1, 1)
    ),
}


@pytest.mark.parametrize(
    ("dtype", "most", "kind"),
    [(np.float16, 250, None), (np.float16, 260, "float16"), (np.float32, 1e19, None), (np.float32, 2e19, "float"),
     (np.float64, 1e150, None), (np.float64, 1e154, "double")],
)  # fmt: skip
def test_weights_whose_squares_overflow_are_kept(dtype, most: float, kind: str | None) -> None:
    proto = product_model("MatMul", (4, 4), (4, 4))
    weight = np.ones((4, 4), dtype)
    weight[1, 2] = -most
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, proto.graph.initializer[0].name))
    found, kept = layers(Graph(proto))
    assert len(found) == (kind is None)
    assert [entry.reason for entry in kept] == (
        [f"its weights reach {float(dtype(most)):.3g}: squares of such numbers overflow in {kind}"] if kind else []
    )


@pytest.mark.parametrize("expected", KEPT)
def test_nodes_kept_for_what_they_hold(expected) -> None:
    assert reason(KEPT[expected]) == expected


def test_long_chains_of_rearranging_operators_do_not_recurse() -> None:
    nodes = [helper.make_node("Identity", [f"h{i}"], [f"h{i + 1}"]) for i in range(2000)]
    nodes[0].input[0] = "x"
    assert reason(unchecked([*nodes, helper.make_node("MatMul", ["h2000", "h2000"], ["y"])])) == (
        "both operands are activations"
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_name_the_tensor(bad) -> None:
    proto = product_model("MatMul", (3, 4), (4, 5))
    array = numpy_helper.to_array(proto.graph.initializer[0]).copy()
    array[1, 2] = bad
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(array, "w"))
    text = (
        "got NaN or infinity in weight 'w' of 'product'; expected finite weights; repair the model or export it again"
    )
    with pytest.raises(InputError, match=f"^{re.escape(text)}$"):
        layers(Graph(proto))
    assert len(layers(Graph(proto), check=False)[0]) == 1


def test_canonical_convolution() -> None:
    proto = conv_model((1, 4, 9, 9), (6, 2, 3, 1), group=2, strides=[2, 1], pads=[1, 0, 2, 0], auto_pad="NOTSET")
    layer = layers(Graph(proto))[0][0]
    assert layer.shape == LayerShape(2, 3, 2, (3, 1))
    assert layer.form.geometry == Geometry((2, 1), (1, 1), (1, 0, 2, 0))
    assert layer.form.bias
    assert np.array_equal(layer.read().reshape(6, 2, 3, 1), numpy_helper.to_array(proto.graph.initializer[0]))


def test_alpha_and_transposes_are_absorbed() -> None:
    proto = product_model("Gemm", (5, 3), (4, 5), left=True, c=(1,), alpha=0.5, beta=0.25)
    layer = layers(Graph(proto))[0][0]
    w = numpy_helper.to_array(proto.graph.initializer[0])
    assert (layer.form.side, layer.form.beta, layer.form.bias) == ("left", 0.25, True)
    assert np.array_equal(layer.read(), 0.5 * w[None])
    right = layers(Graph(product_model("MatMul", (3, 5), (2, 3, 5, 4))))[0][0]
    assert right.shape == LayerShape(6, 4, 5)
    assert right.form.batch == (2, 3)


@pytest.mark.parametrize(
    ("elem_type", "dtype"),
    [(TensorProto.FLOAT16, np.float32), (TensorProto.BFLOAT16, np.float32), (TensorProto.DOUBLE, np.float64)],
)
def test_reading_widens(elem_type, dtype) -> None:
    layer = layers(Graph(conv_model((1, 4, 5, 5), (4, 4, 3, 3), elem_type=elem_type, opset=22)))[0][0]
    assert layer.read().dtype == dtype
    assert layer.form.elem_type == elem_type


@pytest.mark.parametrize(
    ("nodes", "opset", "expected"),
    [
        ([("Relu", {})], 17, ("Relu", ())),
        ([("LeakyRelu", {})], 17, ("LeakyRelu", (("alpha", pytest.approx(0.01)),))),
        ([("Clip", {"min": 0.0, "max": 6.0})], 9, ("Clip", (("max", 6.0), ("min", 0.0)))),
        ([("Softmax", {})], 17, None),
        ([("Relu", {}), ("Relu", {})], 17, None),
    ],
)
def test_following_activation(nodes, opset, expected) -> None:
    proto = product_model("MatMul", (3, 4), (4, 5), opset=opset)
    proto.graph.node[0].output[0] = "h"
    for i, (op, attributes) in enumerate(nodes):
        proto.graph.node.append(helper.make_node(op, ["h"], [f"y{i}" if i else "y"], **attributes))
    assert layers(Graph(proto))[0][0].form.activation == expected


@pytest.mark.parametrize(
    ("limits", "expected"),
    [(["lo", "hi"], (("max", 6.0), ("min", 0.0))), (["", "hi"], (("max", 6.0),)), (["x0"], None)],
)
def test_clip_with_operands(limits, expected) -> None:
    node = helper.make_node("Clip", ["h", *limits], ["y"])
    tensors = {**weights(4, 4), "lo": np.array(0, np.float32), "hi": np.array(6, np.float32)}
    dense = helper.make_node("MatMul", ["x", "w"], ["h"])
    form = layers(Graph(unchecked([dense, node], tensors)))[0][0].form
    assert form.activation == (None if expected is None else ("Clip", expected))


def test_trace_gives_sites_and_macs() -> None:
    proto = conv_model((1, 4, 9, 9), (6, 2, 3, 3), group=2)
    graph = Graph(proto)
    seen = NodeShapes(((2, 4, 9, 9), (6, 2, 3, 3), (6,)), ((2, 6, 7, 7),), 3.0)
    layer = layers(graph, {"conv": [seen]})[0][0]
    assert layer.sites[0].input_shape == (2, 4, 9, 9)
    assert layer.macs == 3 * 2 * 6 * 49 * 2 * 9
    assert reason_with(graph, {}) == NEVER_RAN
    empty = NodeShapes(((0, 4, 9, 9), (6, 2, 3, 3), (6,)), ((0, 6, 7, 7),))
    assert reason_with(graph, {"conv": [empty]}) == "an input or output has a dimension of size 0"
    vector = Graph(product_model("MatMul", (3, 4), (2, 4, 5)))
    assert (
        reason_with(vector, {"product": [NodeShapes(((4,), (2, 4, 5)), ((2, 5),))]})
        == "a vector times a stack of matrices"
    )


def reason_with(graph: Graph, trace: dict[str, list[NodeShapes]]) -> str:
    found, kept = layers(graph, trace)
    assert not found
    return kept[0].reason


def test_kept_nodes_count_too() -> None:
    proto = conv_model((1, 4, 5, 5), (8, 1, 3, 3), group=4)
    trace = shapes_as_trace(Graph(proto), {"x": [1, 4, 5, 5], "y": [1, 8, 3, 3], "other": ["n"]})
    kept = layers(Graph(proto), trace)[1][0]
    assert (kept.op, kept.shape, kept.params, kept.macs) == ("Conv", "8x1x3x3", 72, 8 * 9 * 9)


@pytest.mark.parametrize(
    ("op", "attributes", "shapes", "constants", "expected"),
    [
        ("MatMul", {}, NodeShapes(((2, 3, 4), (2, 4, 5)), ((2, 3, 5),)), {}, 2 * 3 * 4 * 5),
        ("Gemm", {"transA": 1}, NodeShapes(((4, 3), (4, 5)), ((3, 5),)), {}, 3 * 4 * 5),
        ("ConvTranspose", {}, NodeShapes(((1, 3, 4, 4), (3, 2, 2, 2)), ((1, 2, 8, 8),)), {1: (3, 2, 2, 2)}, 48 * 8),
        ("LSTM", {}, NodeShapes(((7, 2, 3),), ((7, 1, 2, 5),)), {1: (1, 20, 3), 2: (1, 20, 5)}, 14 * (60 + 100)),
        ("Einsum", {"equation": "bij,jk->bik"}, NodeShapes(((2, 3, 4), (4, 5)), ((2, 3, 5),)), {}, 2 * 3 * 4 * 5),
        ("Einsum", {"equation": "...j,jk->...k"}, NodeShapes(((2, 4), (4, 5)), ((2, 5),)), {}, 0),
        ("Relu", {}, NodeShapes(((2, 4),), ((2, 4),)), {}, 0),
    ],
)
def test_macs_of_kept_operators(op, attributes, shapes, constants, expected) -> None:
    assert node_macs(helper.make_node(op, ["a"], ["b"], **attributes), shapes, constants) == expected


def test_keys_name_every_node_of_the_traced_copy() -> None:
    branch = [
        helper.make_graph([helper.make_node("MatMul", ["x", "w"], [out])], out, [], [value(out, [2, 4])])
        for out in "ab"
    ]
    nodes = [
        helper.make_node("If", ["c"], ["h"], then_branch=branch[0], else_branch=branch[1]),
        helper.make_node("Relu", ["h"], ["y"], name="relu"),
    ]
    proto = model(nodes, [value("x", [2, 4]), value("c", [], TensorProto.BOOL)], [value("y", [2, 4])], weights(4, 4))
    graph = Graph(proto)
    keys = [key for _, _, key in keyed_nodes(graph)]
    assert set(keys) == {"h", "relu", "#0.else_branch/b", "#0.then_branch/a"}
    named = traceable(graph)
    onnxruntime.InferenceSession(named.SerializeToString(), providers=["CPUExecutionProvider"])
    assert sorted(node.name for scope in Graph(named).scopes() for node in scope.nodes) == sorted(keys)
    assert graph.to_proto().SerializeToString() == proto.SerializeToString()


def test_large_models_are_named_without_their_weights() -> None:
    named = traceable(Graph(product_model("MatMul", (3, 4), (4, 5))), lambda tensor: onnx.TensorProto(name=tensor.name))
    assert not named.graph.initializer[0].raw_data
