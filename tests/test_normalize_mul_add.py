"""Folding of constant arithmetic after weights, and what must be left alone, against onnxruntime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from builders import apply_passes, model, op_types, run_model, value, worst_error
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, helper

from onnx_lowrank.passes.normalize import FoldMulAdd

quick = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31)


def assert_same(before: ModelProto, after: ModelProto, x: np.ndarray) -> None:
    assert worst_error(run_model(before, {"x": x}), run_model(after, {"x": x})) < 1e-5


@quick
@given(
    seed=seeds,
    op=st.sampled_from(["Conv", "Gemm", "MatMul"]),
    chain=st.lists(st.sampled_from(["Mul", "Div", "Add", "Sub"]), min_size=1, max_size=3),
    swap=st.booleans(),
    plain=st.booleans(),
)
def test_constants_after_a_weight(seed: int, op: str, chain: list[str], swap: bool, plain: bool) -> None:
    rng = np.random.default_rng(seed)
    shapes = {"Conv": (4, 3, 1, 1), "Gemm": (3, 4), "MatMul": (3, 4)}
    weights = {"w": rng.normal(size=shapes[op]).astype(np.float32)}
    nodes = [helper.make_node(op, ["x", "w"], ["t0"], name="layer")]
    for i, name in enumerate(chain):
        size = () if plain else ((4, 1, 1) if op == "Conv" else (4,))
        weights[f"c{i}"] = rng.uniform(0.5, 2, size=size).astype(np.float32)
        inputs = [f"t{i}", f"c{i}"]
        nodes.append(helper.make_node(name, inputs[::-1] if swap and name in {"Mul", "Add"} else inputs, [f"t{i + 1}"]))
    shape = (2, 3, 5, 5) if op == "Conv" else (2, 3)
    last = value(f"t{len(chain)}", (2, 4, 5, 5) if op == "Conv" else (2, 4))
    proto = model(nodes, [value("x", shape)], [last], weights)
    after, _ = apply_passes(proto, FoldMulAdd())
    if op != "MatMul":
        assert op_types(after) == [op]
    assert_same(proto, after, rng.normal(size=shape).astype(np.float32))


THOUSAND = np.full((2, 2, 1, 1), 1000, np.float32)


def conv_mul(extra: list[onnx.NodeProto], outputs: list[str], **weights: np.ndarray) -> ModelProto:
    nodes = [helper.make_node("Conv", ["x", "w"], ["t"]), helper.make_node("Mul", ["t", "s"], ["y"]), *extra]
    arrays = {"w": np.ones((2, 2, 1, 1), np.float32), "s": np.full((1, 2, 1, 1), 3, np.float32)} | weights
    return model(nodes, [value("x", (1, 2, 4, 4))], [value(name, (1, 2, 4, 4)) for name in outputs], arrays)


@pytest.mark.parametrize(
    "proto",
    [
        pytest.param(conv_mul([], ["y", "t"]), id="the tensor between is an output"),
        pytest.param(conv_mul([helper.make_node("Relu", ["t"], ["z"])], ["y", "z"]), id="it has two readers"),
        pytest.param(conv_mul([helper.make_node("Conv", ["x", "w"], ["z"])], ["y", "z"]), id="the weight is shared"),
        pytest.param(conv_mul([], ["y"], s=np.arange(4, dtype=np.float32).reshape(1, 1, 1, 4)), id="along width"),
        pytest.param(
            conv_mul([], ["y"], s=np.full((1, 2, 1, 1), 3e38, np.float32), w=THOUSAND),
            id="overflow",
        ),
    ],
)
def test_left_alone(proto: ModelProto) -> None:
    after, notes = apply_passes(proto, FoldMulAdd())
    assert notes == []
    assert after == proto


def test_a_shared_bias_is_copied_and_an_input_with_default_left_alone() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["t"], name="conv"),
        helper.make_node("Mul", ["t", "s"], ["u"]),
        helper.make_node("Add", ["u", "b4"], ["v"]),
        helper.make_node("Reshape", ["b", "shape"], ["r"]),
        helper.make_node("Add", ["v", "r"], ["y"]),
    ]
    weights = {
        "w": np.ones((2, 2, 1, 1), np.float32),
        "b": np.array([1, 2], np.float32),
        "s": np.full((1, 2, 1, 1), 3, np.float32),
        "b4": np.ones((1, 2, 1, 1), np.float32),
        "shape": np.array([1, 2, 1, 1]),
    }
    proto = model(nodes, [value("x", (1, 2, 4, 4)), value("b4", (1, 2, 1, 1))], [value("y", (1, 2, 4, 4))], weights)
    after, notes = apply_passes(proto, FoldMulAdd())
    assert len(notes) == 1
    assert [tensor.name for tensor in after.graph.initializer if tensor.dims == [2]] == ["b", "conv.bias"]
    assert_same(proto, after, np.ones((1, 2, 4, 4), np.float32))


def test_ir_version_3_initializers_that_are_inputs_are_constants() -> None:
    weights = {"w": np.ones((2, 2, 1, 1), np.float32), "s": np.full((1, 2, 1, 1), 3, np.float32)}
    nodes = [helper.make_node("Conv", ["x", "w"], ["t"]), helper.make_node("Mul", ["t", "s"], ["y"])]
    listed = [value(name, array.shape) for name, array in weights.items()]
    proto = model(nodes, [value("x", (1, 2, 4, 4)), *listed], [value("y", (1, 2, 4, 4))], weights, 8, 3)
    after, _ = apply_passes(proto, FoldMulAdd())
    assert op_types(after) == ["Conv"]
    assert_same(proto, after, np.ones((1, 2, 4, 4), np.float32))
