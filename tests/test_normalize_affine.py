"""Folding of BatchNormalization and constant arithmetic into weights, against onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from builders import apply_passes, model, op_types, run_model, value, worst_error
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnx_lowrank.graph import Graph
from onnx_lowrank.passes.normalize import FoldBatchNorm, FoldBatchNormBefore

quick = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31)


def assert_same(before: ModelProto, after: ModelProto, x: np.ndarray, tolerance: float = 1e-5) -> None:
    assert worst_error(run_model(before, {"x": x}), run_model(after, {"x": x})) < tolerance


def statistics(rng: np.random.Generator, channels: int, prefix: str = "") -> dict[str, np.ndarray]:
    names = [prefix + name for name in ("gamma", "beta", "mean", "var")]
    gamma, beta, mean, spread = rng.normal(size=(4, channels)).astype(np.float32)
    return dict(zip(names, (gamma, beta, mean, spread**2 + np.float32(0.1)), strict=True))


def batch_norm(x: str, y: str, prefix: str = "", **attributes: Any) -> onnx.NodeProto:
    names = [prefix + name for name in ("gamma", "beta", "mean", "var")]
    return helper.make_node("BatchNormalization", [x, *names], [y], name=f"{prefix}bn", **attributes)


@quick
@given(
    seed=seeds,
    groups=st.sampled_from([1, 2, 4]),
    spatial=st.sampled_from([1, 2, 3]),
    bias=st.booleans(),
    opset=st.sampled_from([7, 8, 9, 13, 14, 15, 17]),
)
def test_batch_norm_after_conv(seed: int, groups: int, spatial: int, bias: bool, opset: int) -> None:
    rng = np.random.default_rng(seed)
    weights = statistics(rng, 8)
    weights["w"] = rng.normal(size=(8, 4 // groups, *(3,) * spatial)).astype(np.float32)
    if bias:
        weights["b"] = rng.normal(size=8).astype(np.float32)
    inputs = ["x", "w", "b"] if bias else ["x", "w"]
    conv = helper.make_node("Conv", inputs, ["t"], name="conv", group=groups, pads=[1] * 2 * spatial)
    shape = (2, 4, *(6,) * spatial)
    attributes: dict[str, Any] = {"spatial": 1} if opset < 9 else {}
    proto = model(
        [conv, batch_norm("t", "y", epsilon=1e-3, **attributes)],
        [value("x", shape)],
        [value("y", (2, 8, *(6,) * spatial))],
        weights,
        opset,
    )
    after, notes = apply_passes(proto, FoldBatchNorm())
    assert op_types(after) == ["Conv"]
    assert notes == ["BatchNormalization bn folded into conv"]
    assert after.opset_import[0].version == opset
    assert_same(proto, after, rng.normal(size=shape).astype(np.float32))


@quick
@given(seed=seeds, trans=st.booleans(), alpha=st.sampled_from([1.0, 0.5]), beta=st.sampled_from([0.0, 1.0, 2.0]))
def test_batch_norm_on_both_sides_of_gemm(seed: int, trans: bool, alpha: float, beta: float) -> None:
    rng = np.random.default_rng(seed)
    weights = statistics(rng, 5, "in_") | statistics(rng, 7)
    weights["w"] = rng.normal(size=(7, 5) if trans else (5, 7)).astype(np.float32)
    weights["c"] = rng.normal(size=(1, 7)).astype(np.float32)
    gemm = helper.make_node("Gemm", ["a", "w", "c"], ["t"], name="fc", transB=int(trans), alpha=alpha, beta=beta)
    proto = model(
        [batch_norm("x", "a", "in_"), gemm, batch_norm("t", "y")], [value("x", (3, 5))], [value("y", (3, 7))], weights
    )
    after, _ = apply_passes(proto, FoldBatchNorm(), FoldBatchNormBefore())
    assert op_types(after) == ["Gemm"]
    assert_same(proto, after, rng.normal(size=(3, 5)).astype(np.float32), 1e-4)


@quick
@given(seed=seeds, bias=st.booleans())
def test_batch_norm_after_matmul_of_matrices(seed: int, bias: bool) -> None:
    rng = np.random.default_rng(seed)
    weights = statistics(rng, 7) | {"w": rng.normal(size=(5, 7)).astype(np.float32)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["p"], name="fc")]
    if bias:
        weights["b"] = rng.normal(size=7).astype(np.float32)
        nodes.append(helper.make_node("Add", ["b", "p"], ["t"]))
    nodes.append(batch_norm("t" if bias else "p", "y"))
    proto = model(nodes, [value("x", ("n", 5))], [value("y", ("n", 7))], weights)
    after, _ = apply_passes(proto, FoldBatchNorm())
    assert op_types(after) == ["MatMul", "Add"]
    assert_same(proto, after, rng.normal(size=(3, 5)).astype(np.float32))


def test_batch_norm_over_the_second_axis_of_a_batched_product_stays() -> None:
    rng = np.random.default_rng(0)
    weights = statistics(rng, 7) | {"w": rng.normal(size=(5, 7)).astype(np.float32)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["t"]), batch_norm("t", "y")]
    proto = model(nodes, [value("x", (2, 7, 5))], [value("y", (2, 7, 7))], weights)
    assert apply_passes(proto, FoldBatchNorm(), FoldBatchNormBefore())[1] == []


@quick
@given(
    seed=seeds,
    pads=st.sampled_from([(0, 0, 0, 0), (1, 1, 1, 1), (0, 1, 0, 0)]),
    auto_pad=st.sampled_from(["NOTSET", "VALID", "SAME_UPPER"]),
    before=st.sampled_from(["Mul", "Div", "Add", "Sub", "BatchNormalization"]),
    groups=st.sampled_from([1, 2]),
    shape=st.sampled_from([(), (1,), (4, 1, 1), (1, 4, 1, 1), (1, 1, 1, 1)]),
)
def test_before_conv_a_shift_is_folded_only_without_padding(
    seed: int, pads: tuple[int, ...], auto_pad: str, before: str, groups: int, shape: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(seed)
    weights = {"w": rng.normal(size=(6, 4 // groups, 3, 3)).astype(np.float32)}
    if before == "BatchNormalization":
        weights |= statistics(rng, 4)
        first = batch_norm("x", "t")
    else:
        weights["c"] = (rng.uniform(0.5, 2, size=shape)).astype(np.float32)
        first = helper.make_node(before, ["x", "c"], ["t"])
    padding: dict[str, Any] = {"pads": pads} if auto_pad == "NOTSET" else {"auto_pad": auto_pad}
    conv = helper.make_node("Conv", ["t", "w"], ["y"], name="conv", group=groups, **padding)
    proto = model([first, conv], [value("x", (1, 4, 6, 6))], [value("y", ("n", "c", "h", "v"))], weights)
    after, _ = apply_passes(proto, FoldBatchNormBefore())
    padded = any(pads) if auto_pad == "NOTSET" else auto_pad == "SAME_UPPER"
    assert (op_types(after) == ["Conv"]) == (before in {"Mul", "Div"} or not padded)
    assert_same(proto, after, rng.normal(size=(1, 4, 6, 6)).astype(np.float32))


def test_a_constant_that_stretches_the_channel_axis_is_not_folded() -> None:
    weights = {"w": np.ones((2, 3, 1, 1), np.float32), "c": np.arange(1, 4, dtype=np.float32).reshape(1, 3, 1, 1)}
    nodes = [helper.make_node("Mul", ["x", "c"], ["t"]), helper.make_node("Conv", ["t", "w"], ["y"])]
    proto = model(nodes, [value("x", (1, 1, 4, 4))], [value("y", (1, 2, 4, 4))], weights)
    assert apply_passes(proto, FoldBatchNormBefore())[1] == []


def test_the_end_of_a_gelu_stays_for_the_runtime_to_fuse() -> None:
    scalar = {name: np.array(number, np.float32) for name, number in (("root", 2**0.5), ("one", 1), ("half", 0.5))}
    nodes = [
        helper.make_node("Div", ["x", "root"], ["a"]),
        helper.make_node("Erf", ["a"], ["b"]),
        helper.make_node("Add", ["b", "one"], ["c"]),
        helper.make_node("Mul", ["x", "c"], ["d"]),
        helper.make_node("Mul", ["d", "half"], ["e"]),
        helper.make_node("Conv", ["e", "w"], ["y"]),
    ]
    weights = scalar | {"w": np.ones((2, 2, 1, 1), np.float32)}
    proto = model(nodes, [value("x", (1, 2, 4, 4))], [value("y", (1, 2, 4, 4))], weights)
    assert apply_passes(proto, FoldBatchNormBefore())[1] == []


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE])
def test_other_element_types_are_folded_in_float64_and_rounded_once(kind: int) -> None:
    rng = np.random.default_rng(1)
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    arrays = {name: array.astype(dtype) for name, array in statistics(rng, 3).items()}
    arrays["w"] = rng.normal(size=(3, 2, 1, 1)).astype(dtype)
    tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    nodes = [helper.make_node("Conv", ["x", "w"], ["t"]), batch_norm("t", "y")]
    graph = helper.make_graph(nodes, "g", [value("x", (1, 2, 4, 4), kind)], [value("y", (1, 3, 4, 4), kind)], tensors)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)])
    after, _ = apply_passes(proto, FoldBatchNorm())
    got = next(numpy_helper.to_array(t) for t in after.graph.initializer if t.name == "w")
    wide = {name: array.astype(np.float64) for name, array in arrays.items()}
    scale = wide["gamma"] / np.sqrt(wide["var"] + np.float64(np.float32(1e-5)))
    np.testing.assert_array_equal(got, (wide["w"] * scale[:, None, None, None]).astype(dtype))


def test_inside_the_body_of_an_if() -> None:
    rng = np.random.default_rng(2)
    arrays = statistics(rng, 2) | {"w": rng.normal(size=(2, 2, 1, 1)).astype(np.float32)}
    body = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["t"], name="conv"), batch_norm("t", "then")],
        "then",
        [],
        [value("then", (1, 2, 4, 4))],
        [numpy_helper.from_array(array, name) for name, array in arrays.items() if name != "w"],
    )
    other = helper.make_graph([helper.make_node("Relu", ["x"], ["else"])], "else", [], [value("else", (1, 2, 4, 4))])
    branch = helper.make_node("If", ["yes"], ["y"], then_branch=body, else_branch=other)
    outer = {"w": arrays["w"], "yes": np.array(True)}
    proto = model([branch], [value("x", (1, 2, 4, 4))], [value("y", (1, 2, 4, 4))], outer)
    after, notes = apply_passes(proto, FoldBatchNorm())
    assert notes == ["BatchNormalization bn folded into conv"]
    assert_same(proto, after, rng.normal(size=(1, 2, 4, 4)).astype(np.float32))


@pytest.mark.parametrize(("attributes", "opset"), [({"spatial": 0}, 7), ({"training_mode": 1}, 15)])
def test_batch_norm_that_is_no_fixed_map_stays(attributes: dict[str, Any], opset: int) -> None:
    weights = statistics(np.random.default_rng(3), 2) | {"w": np.ones((2, 2, 1, 1), np.float32)}
    bn = batch_norm("t", "y", **attributes)
    if opset == 15:
        bn.output.extend(["running_mean", "running_var"])
    nodes = [helper.make_node("Conv", ["x", "w"], ["t"]), bn]
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "g", [value("x", (1, 2, 1, 1))], [value("y", (1, 2, 1, 1))], tensors)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    assert FoldBatchNorm().run(Graph(proto)).notes == ()
