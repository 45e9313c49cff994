"""Rows of a layer: times its weight they are what onnxruntime makes of its node."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from builders import conv_model, model, product_model, value
from chains import outputs
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper

from onnx_lowrank.calibration.unfold import ROWS_PER_INPUT, Unfolding, rows_per_sample
from onnx_lowrank.graph.applied import applied
from onnx_lowrank.graph.bias import bias_slot
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.layer import Array, LayerShape

RNG = np.random.default_rng(2)
ALL = 10**6


def answered(proto: ModelProto, x: np.ndarray, rows: int = ALL) -> tuple[Array, Array]:
    """M c + b at the sampled positions, and what onnxruntime gives there; node 0 is the layer, y its output."""
    graph = Graph(proto)
    node = graph.main.nodes[0]
    use = applied(graph.main, node)
    assert not isinstance(use, str), use
    unfolding = Unfolding(use.form, use.shape, rows)
    shape = use.shape
    matrix = use.read().reshape(shape.groups, shape.out, -1).astype(np.float64)
    slot = bias_slot(graph.main, node, use)
    bias = np.zeros((shape.groups, shape.out))
    if slot is not None:
        bias = slot.inside(shape.groups * shape.out).reshape(bias.shape)
    c = unfolding.rows(x)
    assert c.shape[1:] == (shape.groups, matrix.shape[2])
    return np.einsum("gsn,rgn->rgs", matrix, c) + bias, unfolding.targets(outputs(proto, {"x": x})[0])


def assert_same(proto: ModelProto, x: np.ndarray, rows: int = ALL) -> int:
    expected, got = answered(proto, x, rows)
    assert expected.shape == got.shape
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * max(1.0, float(np.abs(expected).max(initial=0))))
    return len(got)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[ModelProto, np.ndarray, int]:
    axes = draw(st.integers(1, 3))
    small = st.integers(1, 3)
    groups, in_, out = draw(st.integers(1, 3)), draw(st.integers(2, 3)), draw(small)
    kernel = [draw(small) for _ in range(axes)]
    dilations = [draw(st.integers(1, 2)) for _ in range(axes)]
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    size = [draw(st.integers(r, r + 4)) for r in reach]
    attributes: dict[str, Any] = {"strides": [draw(small) for _ in range(axes)], "group": groups}
    auto = draw(st.sampled_from(["", "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    if auto.startswith("SAME"):
        dilations = [1] * axes  # onnxruntime has no SAME with dilations
    if auto:
        attributes["auto_pad"] = auto
    if auto in {"", "NOTSET"}:
        attributes["pads"] = [draw(st.integers(0, 2)) for _ in range(2 * axes)]
    attributes["dilations"] = dilations
    x = RNG.standard_normal((draw(st.integers(1, 3)), groups * in_, *size)).astype(np.float32)
    proto = conv_model(x.shape, [groups * out, in_, *kernel], bias=draw(st.booleans()), **attributes)
    return proto, x, draw(st.sampled_from([1, 2, 5, ALL]))


@settings(deadline=None, max_examples=60)
@given(convolutions())
def test_rows_of_convolutions(case: tuple[ModelProto, np.ndarray, int]) -> None:
    proto, x, rows = case
    count = assert_same(proto, x, rows)
    positions = math.prod(outputs(proto, {"x": x})[0].shape[2:])
    assert count == len(x) * min(rows, positions)


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_rows_of_gemm(data: st.DataObject) -> None:
    left, turned_a, turned_b = (data.draw(st.booleans()) for _ in range(3))
    m, k, n = (data.draw(st.integers(1, 5)) for _ in range(3))
    a, b = ((k, m) if turned_a else (m, k)), ((n, k) if turned_b else (k, n))
    x, w = (b, a) if left else (a, b)
    c = None if left else data.draw(st.sampled_from([None, (n,), (1, n)]))
    turns = {"transA": int(turned_a), "transB": int(turned_b)}
    attributes: dict[str, Any] = {**turns, "alpha": 0.5, "beta": 2.0 if c else 1.0}
    proto = product_model("Gemm", x, w, left=left, c=c, **attributes)
    assert assert_same(proto, RNG.standard_normal(x).astype(np.float32)) == (n if left else m)


PRODUCTS = [
    pytest.param((5, 4), (4, 3), False, id="matrix"),
    pytest.param((2, 5, 4), (4, 3), False, id="sequence"),
    pytest.param((2, 3, 5, 4), (4, 3), False, id="heads"),
    pytest.param((4,), (4, 3), False, id="vector"),
    pytest.param((2, 3, 5, 4), (3, 4, 2), False, id="stack"),
    pytest.param((5, 4), (3, 4, 2), False, id="matrix times stack"),
    pytest.param((2, 1, 5, 4), (3, 4, 2), False, id="broadcast to the stack"),
    pytest.param((3, 2, 5, 4), (3, 1, 4, 2), False, id="stack broadcast over an inner axis"),
    pytest.param((2, 3, 2, 5, 4), (3, 1, 4, 2), False, id="stack of one in the middle"),
    pytest.param((2, 5, 4), (1, 4, 3), False, id="stack of one"),
    pytest.param((5, 4), (1, 4, 3), False, id="matrix times stack of one"),
    pytest.param((5, 4), (1, 1, 4, 3), False, id="matrix times deep stack of one"),
    pytest.param((4, 5), (3, 4), True, id="left"),
    pytest.param((2, 4, 5), (3, 4), True, id="left of a batch"),
    pytest.param((4,), (3, 4), True, id="left of a vector"),
    pytest.param((2, 3, 4, 5), (3, 2, 4), True, id="left stack"),
    pytest.param((4, 5), (3, 2, 4), True, id="left stack of a matrix"),
]


@pytest.mark.parametrize("rows", [1, 2, ALL])
@pytest.mark.parametrize(("x", "w", "left"), PRODUCTS)
def test_rows_of_matmul(x: Sequence[int], w: Sequence[int], left: bool, rows: int) -> None:
    proto = product_model("MatMul", x, w, left=left)
    assert assert_same(proto, RNG.standard_normal(x).astype(np.float32), rows) >= 1


def test_the_bias_of_a_matmul_is_in_the_add_behind_and_not_in_its_output() -> None:
    tensors = {"w": RNG.standard_normal((4, 3)).astype(np.float32), "c": np.arange(3, dtype=np.float32)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Add", ["m", "c"], ["y"])]
    both = [value("m", [2, 3]), value("y", [2, 3])]
    x = RNG.standard_normal((2, 4)).astype(np.float32)
    assert_same(model(nodes, [value("x", [2, 4])], both, tensors), x)


@pytest.mark.parametrize("elem_type", [TensorProto.FLOAT16, TensorProto.DOUBLE])
def test_precision_of_rows(elem_type: int) -> None:
    proto = conv_model([2, 4, 5, 5], [3, 4, 3, 3], elem_type=elem_type)
    x = RNG.standard_normal((2, 4, 5, 5)).astype(helper.tensor_dtype_to_np_dtype(elem_type))
    use = applied(Graph(proto).main, Graph(proto).main.nodes[0])
    assert not isinstance(use, str)
    wanted = np.float64 if elem_type == TensorProto.DOUBLE else np.float32
    assert Unfolding(use.form, use.shape, ALL).rows(x).dtype == wanted


@pytest.mark.parametrize(
    "proto", [conv_model(["N", 3, 6, 6], [4, 3, 3, 3]), product_model("MatMul", [6, 9, 3], [3, 2])]
)
def test_the_same_positions_whatever_the_batch(proto: ModelProto) -> None:
    graph = Graph(proto)
    use = applied(graph.main, graph.main.nodes[0])
    assert not isinstance(use, str)
    unfolding = Unfolding(use.form, use.shape, 5)
    shape = (6, 3, 6, 6) if use.form.geometry else (6, 9, 3)
    x = RNG.standard_normal(shape).astype(np.float32)
    whole = unfolding.rows(x)
    for size in (1, 2, 4):
        parts = [unfolding.rows(x[i : i + size]) for i in range(0, 6, size)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)


def flattened(rows: int) -> Unfolding:
    """Of a product of a matrix (any, 3) with (3, 2)."""
    graph = Graph(product_model("MatMul", [60, 3], [3, 2]))
    use = applied(graph.main, graph.main.nodes[0])
    assert not isinstance(use, str)
    return Unfolding(use.form, use.shape, rows)


def test_rows_of_flattened_positions_are_limited_and_their_targets_with_them() -> None:
    unfolding, w = flattened(2), RNG.standard_normal((3, 2)).astype(np.float32)
    x = RNG.standard_normal((60, 3)).astype(np.float32)
    for samples, length in ((6, 60), (7, 60), (6, 6), (6, 12)):
        some = x[:length]
        rows, targets = unfolding.rows(some, samples=samples), unfolding.targets(some @ w, samples=samples)
        assert len(rows) == min(length, 2 * samples)
        np.testing.assert_allclose(rows[:, 0] @ w, targets[:, 0], rtol=1e-5, atol=1e-6)
    whole = unfolding.rows(x, samples=6)  # ten positions each
    parts = [unfolding.rows(x[10 * i : 10 * i + 20], samples=2) for i in (0, 2, 4)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_one_row_per_sample_stays_whole_whatever_the_limit() -> None:
    x = RNG.standard_normal((32, 3)).astype(np.float32)
    np.testing.assert_array_equal(flattened(1).rows(x, samples=32)[:, 0], x)


def test_positions_differ_by_seed_and_are_all_there_when_few() -> None:
    graph = Graph(conv_model([1, 2, 9, 9], [2, 2, 1, 1]))
    use = applied(graph.main, graph.main.nodes[0])
    assert not isinstance(use, str)
    x = np.arange(2 * 81, dtype=np.float32).reshape(1, 2, 9, 9)
    seeds = [frozenset(Unfolding(use.form, use.shape, 20, seed).rows(x)[:, 0, 0]) for seed in range(3)]
    assert len(set(seeds)) == 3
    assert all(len(chosen) == 20 for chosen in seeds)
    assert sorted(Unfolding(use.form, use.shape, 81).rows(x)[:, 0, 0]) == list(range(81))


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 512), st.integers(1, 3), st.integers(1, 4096))
def test_rows_are_never_fewer_than_some_per_input(groups: int, in_: int, kernel: int, samples: int) -> None:
    shape = LayerShape(groups, 7, in_, (kernel, kernel))
    assert rows_per_sample(shape, samples) * samples >= ROWS_PER_INPUT * in_ * kernel**2
