"""Constant folding, identities, denormals and HardSwish, against onnxruntime."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import pytest
from builders import apply_passes, model, op_types, run_model, value, worst_error
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from onnx_lowrank.passes.normalize import (
    DEFAULT_NORMALIZE,
    MEASURED_NORMALIZE,
    FlushDenormals,
    FoldConstants,
    FuseHardSwish,
    InlineFunctions,
    RemoveIdentity,
)

quick = settings(deadline=None, max_examples=25)
RNG = np.random.default_rng(0)


def assert_same(before: ModelProto, after: ModelProto, x: np.ndarray) -> None:
    assert worst_error(run_model(before, {"x": x}), run_model(after, {"x": x})) < 1e-5


def number(name: str, content: float, shape: tuple[int, ...] = ()) -> NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.full(shape, content, np.float32)))


@quick
@given(order=st.lists(st.sampled_from(["Transpose", "Identity", "Cast", "Reshape", "Sqrt", "Mul"]), max_size=4))
def test_what_stands_in_front_of_a_weight_becomes_its_value(order: list[str]) -> None:
    weights = {"w0": RNG.uniform(0.5, 1, size=(4, 4)).astype(np.float32), "shape": np.array([4, 4])}
    nodes: list[NodeProto] = [number("two", 2)]
    extra = {"Reshape": ["shape"], "Mul": ["two"]}
    attributes: dict[str, dict[str, Any]] = {"Cast": {"to": TensorProto.FLOAT}, "Transpose": {"perm": [1, 0]}}
    for i, op in enumerate(order):
        nodes.append(helper.make_node(op, [f"w{i}", *extra.get(op, [])], [f"w{i + 1}"], **attributes.get(op, {})))
    nodes.append(helper.make_node("MatMul", ["x", f"w{len(order)}"], ["y"]))
    proto = model(nodes, [value("x", (3, 4))], [value("y", (3, 4))], weights)
    after, notes = apply_passes(proto, FoldConstants())
    assert [op for op in op_types(after) if op != "Constant"] == ["MatMul"]
    assert len(notes) == len(order)
    assert_same(proto, after, RNG.normal(size=(3, 4)).astype(np.float32))


@pytest.mark.parametrize(("to", "kind"), [(TensorProto.BFLOAT16, "bfloat16"), (TensorProto.FLOAT16, "float16")])
def test_a_cast_weight_keeps_the_type_it_was_cast_to(to: int, kind: str) -> None:
    nodes = [helper.make_node("Cast", ["w"], ["c"], to=to), helper.make_node("MatMul", ["x", "c"], ["y"])]
    weights = {"w": RNG.normal(size=(4, 4)).astype(np.float32)}
    after, _ = apply_passes(model(nodes, [value("x", (3, 4), to)], [value("y", (3, 4), to)], weights), FoldConstants())
    assert op_types(after) == ["MatMul"]
    assert numpy_helper.to_array(after.graph.initializer[0]).dtype.name == kind


def test_a_tied_embedding_is_not_stored_twice_and_unrelated_constants_stay() -> None:
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["e"]),
        helper.make_node("Transpose", ["table"], ["head"], perm=[1, 0]),
        helper.make_node("MatMul", ["e", "head"], ["y"]),
        helper.make_node("Transpose", ["small"], ["z"], perm=[1, 0]),
    ]
    weights = {"table": RNG.normal(size=(600, 40)).astype(np.float32), "small": np.ones((2, 3), np.float32)}
    inputs, outputs = [value("ids", (2,), TensorProto.INT64)], [value("y", (2, 600)), value("z", (3, 2))]
    proto = model(nodes, inputs, outputs, weights)
    assert apply_passes(proto, FoldConstants())[1] == []
    assert len(apply_passes(proto, FoldConstants(copy_limit=24000))[1]) == 1


def test_identities_go_and_the_names_of_outputs_stay() -> None:
    nodes = [
        helper.make_node("Identity", ["x"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Dropout", ["b"], ["c"], name="drop"),
        helper.make_node("Cast", ["x"], ["d"], to=TensorProto.FLOAT, name="cast"),
        helper.make_node("Add", ["c", "d"], ["e"]),
        helper.make_node("Identity", ["e"], ["y"], name="last"),
        helper.make_node("Identity", ["x"], ["z"], name="kept"),
        helper.make_node("Identity", ["y"], ["v"], name="copy"),
    ]
    proto = model(nodes, [value("x", (2, 3))], [value(name, (2, 3)) for name in "yzv"])
    after, notes = apply_passes(proto, RemoveIdentity())
    assert notes == [
        "Identity first removed: it does nothing",
        "Dropout drop removed: it does nothing",
        "Cast cast removed: it does nothing",
        "Identity last removed: it does nothing",
    ]
    assert [node.name for node in after.graph.node if node.op_type == "Identity"] == ["kept", "copy"]
    assert_same(proto, after, RNG.normal(size=(2, 3)).astype(np.float32))


@pytest.mark.parametrize(
    "node",
    [
        pytest.param(helper.make_node("Dropout", ["x"], ["y", "mask"]), id="its mask is read"),
        pytest.param(helper.make_node("Dropout", ["x", "", "train"], ["y"]), id="it may train"),
        pytest.param(helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT16), id="another type"),
    ],
)
def test_nodes_that_may_do_something_stay(node: NodeProto) -> None:
    out = value("z", (2, 3), TensorProto.FLOAT16 if node.op_type == "Cast" else TensorProto.FLOAT)
    inputs = [value("x", (2, 3)), value("train", (), TensorProto.BOOL)]
    outputs = [out] + ([value("mask", (2, 3), TensorProto.BOOL)] if len(node.output) > 1 else [])
    assert (
        apply_passes(model([node, helper.make_node("Abs", ["y"], ["z"])], inputs, outputs), RemoveIdentity())[1] == []
    )


def test_an_identity_read_inside_a_body_is_renamed_there() -> None:
    body = helper.make_graph([helper.make_node("Neg", ["a"], ["t"])], "then", [], [value("t", (2, 3))])
    other = helper.make_graph([helper.make_node("Abs", ["a"], ["f"])], "else", [], [value("f", (2, 3))])
    nodes = [
        helper.make_node("Identity", ["x"], ["a"]),
        helper.make_node("If", ["yes"], ["y"], then_branch=body, else_branch=other),
    ]
    proto = model(nodes, [value("x", (2, 3))], [value("y", (2, 3))], {"yes": np.array(True)})
    after, _ = apply_passes(proto, RemoveIdentity())
    assert op_types(after) == ["If"]
    assert_same(proto, after, RNG.normal(size=(2, 3)).astype(np.float32))


def test_denormals_are_flushed_and_dead_channels_counted() -> None:
    w = RNG.normal(size=(4, 3, 1, 1)).astype(np.float32)
    w[1], w[2, 0] = 1e-40, 1e-30
    m = RNG.normal(size=(4, 5)).astype(np.float32)
    m[:, 0] = 1e-39
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["t"], name="conv"),
        helper.make_node("GlobalAveragePool", ["t"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "m"], ["y"], name="fc"),
    ]
    proto = model(nodes, [value("x", (1, 3, 4, 4))], [value("y", (1, 5))], {"w": w, "m": m})
    after, notes = apply_passes(proto, FlushDenormals())
    assert notes == [
        "4 weights of w flushed to zero, 1 output channels are dead",
        "4 weights of m flushed to zero, 1 output channels are dead",
    ]
    flushed = numpy_helper.to_array(after.graph.initializer[0])
    np.testing.assert_array_equal(flushed, np.where(np.abs(w) < 1e-20, 0, w))
    assert_same(proto, after, RNG.normal(size=(1, 3, 4, 4)).astype(np.float32))
    assert apply_passes(after, FlushDenormals())[1] == []


CLIPS = ["Clip", "Clip attributes", "Min of Max", "Max of Min", "Relu and Min"]
SCALES = ["Div", "Mul"]
ORDERS = ["product first", "scale first", "no product"]


def hard_swish(clip: str, scale: str, order: str, *, swap: bool, high: float = 6.0) -> ModelProto:
    """x * clip(x + 3, 0, 6) / 6 in one of its spellings."""

    def pair(a: str, b: str) -> list[str]:
        return [b, a] if swap else [a, b]

    nodes = [number("three", 3), number("zero", 0), number("top", high)]
    nodes.append(number("scale", 6 if scale == "Div" else 1 / 6, (1,)))
    nodes.append(helper.make_node("Add", pair("x", "three"), ["s"]))
    match clip:
        case "Clip":
            nodes.append(helper.make_node("Clip", ["s", "zero", "top"], ["g"]))
        case "Clip attributes":
            nodes.append(helper.make_node("Clip", ["s"], ["g"], min=0.0, max=high))
        case "Min of Max":
            nodes.append(helper.make_node("Max", pair("s", "zero"), ["h"]))
            nodes.append(helper.make_node("Min", pair("h", "top"), ["g"]))
        case "Max of Min":
            nodes.append(helper.make_node("Min", pair("s", "top"), ["h"]))
            nodes.append(helper.make_node("Max", pair("h", "zero"), ["g"]))
        case _:
            nodes.append(helper.make_node("Relu", ["s"], ["h"]))
            nodes.append(helper.make_node("Min", pair("h", "top"), ["g"]))

    def scaled(source: str, target: str) -> NodeProto:
        return helper.make_node(scale, [source, "scale"] if scale == "Div" else pair(source, "scale"), [target])

    match order:
        case "product first":
            nodes += [helper.make_node("Mul", pair("x", "g"), ["p"]), scaled("p", "y")]
        case "scale first":
            nodes += [scaled("g", "p"), helper.make_node("Mul", pair("x", "p"), ["y"])]
        case _:
            nodes.append(scaled("g", "y"))
    return model(nodes, [value("x", ("n", 64))], [value("y", ("n", 64))], opset=10 if "attr" in clip else 14)


@pytest.mark.parametrize(("clip", "scale", "order"), list(itertools.product(CLIPS, SCALES, ORDERS)))
@pytest.mark.parametrize("swap", [False, True])
def test_hard_swish_in_every_spelling(clip: str, scale: str, order: str, swap: bool) -> None:
    proto = hard_swish(clip, scale, order, swap=swap)
    x = RNG.normal(size=(3, 64), scale=4).astype(np.float32)
    gate_only = order == "no product"
    after, notes = apply_passes(proto, FuseHardSwish())
    assert op_types(after) == (["HardSigmoid"] if gate_only else ["HardSigmoid", "Mul"])
    assert len(notes) == 1
    assert_same(proto, after, x)
    swish, _ = apply_passes(proto, FuseHardSwish(form="hard_swish"))
    modern = proto.opset_import[0].version >= 14
    assert op_types(swish) == (["HardSwish"] if modern and not gate_only else op_types(after))
    assert_same(proto, swish, x)


def test_hard_sigmoid_times_x_becomes_hard_swish_only_when_asked() -> None:
    proto, _ = apply_passes(hard_swish("Clip", "Div", "scale first", swap=False), FuseHardSwish())
    assert apply_passes(proto, FuseHardSwish())[1] == []
    assert op_types(apply_passes(proto, FuseHardSwish(form="hard_swish"))[0]) == ["HardSwish"]


def test_other_limits_and_tensors_read_elsewhere_are_left_alone() -> None:
    assert apply_passes(hard_swish("Clip", "Div", "scale first", swap=False, high=5.0), FuseHardSwish())[1] == []
    proto = hard_swish("Clip", "Div", "scale first", swap=False)
    proto.graph.output.append(value("g", ("n", 64)))
    assert apply_passes(proto, FuseHardSwish())[1] == []


def test_local_functions_with_weights_are_inlined_and_normalized() -> None:
    body = [helper.make_node("MatMul", ["a", "w"], ["t"]), helper.make_node("Add", ["t", "c"], ["b"])]
    layer = helper.make_function("local", "Layer", ["a", "w", "c"], ["b"], body, [helper.make_opsetid("", 17)])
    call = helper.make_node("Layer", ["x", "w", "c"], ["y"], domain="local")
    weights = [
        numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in (("w", (3, 4)), ("c", (4,)))
    ]
    graph = helper.make_graph([call], "g", [value("x", (2, 3))], [value("y", (2, 4))], weights)
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    proto = helper.make_model(graph, opset_imports=imports, functions=[layer], ir_version=8)
    onnx.checker.check_model(proto)
    after, notes = apply_passes(proto, InlineFunctions())
    assert op_types(after) == ["MatMul", "Add"]
    assert notes == ["1 local functions with weights in them inlined"]
    assert_same(proto, after, RNG.normal(size=(2, 3)).astype(np.float32))


def test_everything_together_twice_changes_nothing_more() -> None:
    proto = hard_swish("Clip", "Mul", "product first", swap=True)
    after, _ = apply_passes(proto, *MEASURED_NORMALIZE, *DEFAULT_NORMALIZE)
    again, notes = apply_passes(after, *MEASURED_NORMALIZE, *DEFAULT_NORMALIZE)
    assert notes == []
    assert again == after
