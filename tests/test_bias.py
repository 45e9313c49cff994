"""A change of bias reaches the output it is meant for, and no other."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from builders import conv_model, model, product_model, value
from chains import outputs
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto
from roads import node
from walks import weight

from onnx_lowrank.chain import Chain, Fit
from onnx_lowrank.graph.applied import applied
from onnx_lowrank.graph.bias import BiasSlot, bias_slot
from onnx_lowrank.graph.layers import layers
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.rewrite import Replacement, splice

RNG = np.random.default_rng(6)


def values(proto: ModelProto, feeds: Mapping[str, NDArray[np.generic]]) -> list[NDArray[np.float64]]:
    """Outputs on onnxruntime, as numbers to calculate with."""
    return [np.asarray(output, np.float64) for output in outputs(proto, feeds)]


def slot_of(proto: ModelProto, index: int = 0) -> BiasSlot | None:
    graph = Graph(proto)
    use = applied(graph.main, graph.main.nodes[index])
    assert not isinstance(use, str), use
    return bias_slot(graph.main, graph.main.nodes[index], use)


def shifted(proto: ModelProto, change: NDArray[np.floating], index: int = 0) -> ModelProto:
    """The model with its layer number `index` kept, but for a change of its bias."""
    graph = Graph(proto)
    layer = layers(graph)[0][index]
    fit = Fit((layer.read(),), change)
    splice(graph, [Replacement(layer, Chain.unfactored(layer.shape), fit, {})])
    return graph.to_proto()


def behind(constant: NDArray[np.generic], *more: str, outs: tuple[str, ...] = ("y",)) -> ModelProto:
    """MatMul, Add of a constant, and `more`: "add" (another Add of the same constant) or "read" (of the product)."""
    nodes = [node("MatMul", "x w", "m", "product"), node("Add", "m c", "y")]
    nodes += [node("Add", "x c", "other")] if "add" in more else []
    nodes += [node("Relu", "m", "other")] if "read" in more else []
    ends = [value(n, None) for n in outs]  # pyright: ignore[reportArgumentType]
    for end in ends:
        end.type.tensor_type.shape.SetInParent()
        end.type.tensor_type.shape.dim.add()
        end.type.tensor_type.shape.dim.add()
    return model(nodes, [value("x", [3, 5])], ends, {"w": weight(5, 5), "c": constant})


CASES = [
    pytest.param(conv_model([2, 4, 5, 5], [6, 4, 3, 3]), (2, 4, 5, 5), 6, id="conv"),
    pytest.param(conv_model([2, 4, 5, 5], [6, 4, 3, 3], bias=False), (2, 4, 5, 5), 6, id="conv without"),
    pytest.param(conv_model([2, 4, 5], [6, 2, 3], group=2), (2, 4, 5), 6, id="grouped conv 1-d"),
    pytest.param(product_model("Gemm", [3, 4], [4, 5], c=[5]), (3, 4), 5, id="gemm"),
    pytest.param(product_model("Gemm", [3, 4], [4, 5]), (3, 4), 5, id="gemm without"),
    pytest.param(product_model("Gemm", [3, 4], [4, 5], c=[1, 5], beta=0.25), (3, 4), 5, id="gemm with beta"),
    pytest.param(product_model("Gemm", [3, 4], [4, 5], beta=0.5), (3, 4), 5, id="gemm with beta and no C"),
    pytest.param(product_model("Gemm", [4, 3], [5, 4], c=[5], transA=1, transB=1), (4, 3), 5, id="gemm transposed"),
    pytest.param(behind(np.arange(5, dtype=np.float32)), (3, 5), 5, id="matmul and add"),
    pytest.param(behind(np.arange(5, dtype=np.float32)[None]), (3, 5), 5, id="matmul and add of a row"),
]


@pytest.mark.parametrize(("proto", "x", "channels"), CASES)
def test_a_change_is_added_to_the_output(proto: ModelProto, x: tuple[int, ...], channels: int) -> None:
    feeds = {"x": RNG.standard_normal(x).astype(np.float32)}
    change = RNG.standard_normal(channels)
    before, after = values(proto, feeds)[0], values(shifted(proto, change), feeds)[0]
    along = 1 if proto.graph.node[0].op_type == "Conv" else -1
    shape = [1] * before.ndim
    shape[along] = channels
    np.testing.assert_allclose(after, before + change.reshape(shape), rtol=1e-4, atol=1e-4)
    assert len(shifted(proto, change).graph.node) == len(proto.graph.node)


@pytest.mark.parametrize(("proto", "x", "channels"), CASES)
def test_what_is_inside_is_what_the_layer_gives_at_zero(proto: ModelProto, x: tuple[int, ...], channels: int) -> None:
    slot = slot_of(proto)
    assert slot is not None
    bare = Graph(proto)
    del bare.main.nodes[1:]
    bare.main.proto.output[0].name = bare.main.nodes[0].output[0]
    at_zero = values(bare.to_proto(), {"x": np.zeros(x, np.float32)})[0]
    along = 1 if proto.graph.node[0].op_type == "Conv" else -1
    per_channel = np.moveaxis(at_zero, along, 0).reshape(channels, -1)[:, 0]
    np.testing.assert_allclose(slot.inside(channels), per_channel, rtol=1e-6, atol=1e-6)


NONE = [
    pytest.param(product_model("Gemm", [5, 4], [4, 5], c=[1]), id="gemm with a scalar C"),
    pytest.param(product_model("Gemm", [3, 4], [4, 5], c=[3, 1]), id="gemm with a column"),
    pytest.param(product_model("Gemm", [3, 4], [4, 5], c=[3, 5]), id="gemm with a matrix"),
    pytest.param(product_model("Gemm", [5, 4], [4, 5], c=[5, 1]), id="gemm with a column of as many rows"),
    pytest.param(product_model("Gemm", [3, 4], [4, 5], c=[5], beta=0.0), id="gemm with beta 0"),
    pytest.param(product_model("Gemm", [4, 3], [5, 4], left=True), id="gemm with the weight on the left"),
    pytest.param(product_model("MatMul", [3, 4], [4, 5]), id="matmul with nothing behind"),
    pytest.param(product_model("MatMul", [2, 3, 4], [2, 4, 5]), id="stack of matrices"),
    pytest.param(behind(np.ones((3, 5), np.float32)), id="add of a matrix"),
    pytest.param(behind(np.ones(1, np.float32)), id="add of a scalar"),
    pytest.param(behind(np.ones((3, 1), np.float32)), id="add of a column"),
    pytest.param(behind(np.ones(5, np.float32), "read", outs=("y", "other")), id="the product has other readers"),
    pytest.param(behind(np.ones(5, np.float32), outs=("y", "m")), id="the product is an output"),
]


@pytest.mark.parametrize("proto", NONE)
def test_no_room(proto: ModelProto) -> None:
    assert slot_of(proto) is None


def test_an_add_that_shares_its_constant_keeps_it() -> None:
    proto = behind(np.ones(5, np.float32), "add", outs=("y", "other"))
    x = {"x": RNG.standard_normal((3, 5)).astype(np.float32)}
    before, after = values(proto, x), values(shifted(proto, np.full(5, 2.0)), x)
    np.testing.assert_allclose(after[0], before[0] + 2, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(after[1], before[1])


@pytest.mark.parametrize("op", ["Conv", "Gemm", "MatMul"])
def test_a_bias_that_a_caller_may_override_is_left_alone(op: str) -> None:
    if op == "MatMul":
        proto = behind(np.ones(5, np.float32))
        name, shape = "c", [5]
    else:
        proto = CASES[0 if op == "Conv" else 3].values[0]
        assert isinstance(proto, ModelProto)
        name, shape = ("b", [6]) if op == "Conv" else ("c", [5])
    listed = ModelProto()
    listed.CopyFrom(proto)
    listed.graph.input.append(value(name, shape))
    assert slot_of(proto) is not None
    assert slot_of(listed) is None


def test_a_bias_that_is_computed_is_left_alone() -> None:
    weights = {"w": weight(6, 4, 3, 3), "b": np.ones(6, np.float32)}
    nodes = [node("ReduceMean", "x", "s", axes=[0, 1, 2, 3], keepdims=0), node("Mul", "b s", "bias")]
    nodes.append(node("Conv", "x w bias", "y", "conv"))
    proto = model(nodes, [value("x", [2, 4, 5, 5])], [value("y", [2, 6, 3, 3])], weights)
    assert slot_of(proto, 2) is None


@pytest.mark.parametrize("elem_type", [TensorProto.FLOAT16, TensorProto.DOUBLE])
def test_the_new_bias_has_the_type_of_the_weight(elem_type: int) -> None:
    made = shifted(conv_model([1, 2, 4, 4], [3, 2, 3, 3], elem_type=elem_type), np.ones(3))
    assert {tensor.data_type for tensor in made.graph.initializer} == {elem_type}
    assert len(made.graph.initializer) == 2


@settings(deadline=None, max_examples=20)
@given(st.lists(st.floats(-8, 8), min_size=5, max_size=5), st.sampled_from([0.25, -2.0, 3.0]))
def test_beta_is_divided_out(change: list[float], beta: float) -> None:
    proto = product_model("Gemm", [3, 4], [4, 5], c=[5], beta=beta)
    x = {"x": RNG.standard_normal((3, 4)).astype(np.float32)}
    before, after = values(proto, x)[0], values(shifted(proto, np.array(change)), x)[0]
    np.testing.assert_allclose(after, before + np.array(change), rtol=1e-4, atol=1e-4)
