"""Graphs as exporters write them: every one is rewritten by exact chains and must compute what it computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import pytest
from builders import RNG, model, value
from chains import outputs, reference, relative_error, rewritten
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from onnx_lowrank.graph.layers import layers
from onnx_lowrank.graph.model import Graph

X = RNG.standard_normal((2, 4)).astype(np.float32)
W = RNG.standard_normal((4, 4)).astype(np.float32)


def matmul(name: str, x: str, w: str, y: str) -> NodeProto:
    return helper.make_node("MatMul", [x, w], [y], name=name)


def constant(name: str, array: NDArray[np.generic]) -> NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array, name))


def xy(
    nodes: Sequence[NodeProto], weights: Mapping[str, NDArray[np.generic]], opset: int = 17, ir_version: int = 8
) -> ModelProto:
    return model(nodes, [value("x", [2, 4])], [value("y", [2, 4])], weights, opset, ir_version)


def assert_rewritten(
    original: ModelProto, count: int, feeds: Mapping[str, NDArray[np.generic]] | None = None
) -> ModelProto:
    before = original.SerializeToString()
    result, found = rewritten(original)
    assert found == count
    assert original.SerializeToString() == before
    onnx.checker.check_model(result, full_check=True)
    feeds = feeds or {"x": X}
    for expected, got in zip(outputs(original, feeds), outputs(result, feeds), strict=True):
        assert relative_error(expected, got) < 1e-5
    return result


def operators(proto: ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node]


@pytest.mark.parametrize(
    ("nodes", "weight"),
    [
        ([helper.make_node("Identity", ["w"], ["v"])], W),
        ([helper.make_node("Transpose", ["w"], ["v"])], W),
        ([helper.make_node("Transpose", ["w"], ["v"], perm=[0, 1])], W),
        ([helper.make_node("Cast", ["w"], ["v"], to=TensorProto.FLOAT)], W.astype(np.float16)),
        ([helper.make_node("Cast", ["w"], ["v"], to=TensorProto.FLOAT)], W.astype(np.float64)),
        ([constant("s", np.array([4, -1])), helper.make_node("Reshape", ["w", "s"], ["v"])], W.reshape(2, 8)),
        ([constant("s", np.array([0, 4])), helper.make_node("Reshape", ["w", "s"], ["v"])], W.reshape(4, 2, 2)),
        ([constant("s", np.array([0])), helper.make_node("Squeeze", ["w", "s"], ["v"])], W[None]),
        ([helper.make_node("Squeeze", ["w"], ["v"])], W[None, :, None]),
        ([helper.make_node("Flatten", ["w"], ["v"])], W.reshape(4, 2, 2)),
        ([constant("s", np.array([0])), helper.make_node("Unsqueeze", ["w", "s"], ["v"])], W),
        ([helper.make_node("Identity", ["w"], ["t"]), helper.make_node("Transpose", ["t"], ["v"])], W),
    ],
)
def test_weight_behind_rearranging_operators(nodes, weight) -> None:
    result = value("y", [1, 2, 4] if nodes[-1].op_type == "Unsqueeze" else [2, 4])
    final = nodes[-1].output[0]
    original = model([*nodes, matmul("m", "x", final, "y")], [value("x", [2, 4])], [result], {"w": weight})
    written = assert_rewritten(original, 1)
    assert operators(written) == ["MatMul", "MatMul"]
    assert [tensor.name for tensor in written.graph.initializer] == ["m/output_0/weight", "m/output_1/weight"]


def test_constant_node() -> None:
    written = assert_rewritten(xy([constant("w", W), matmul("m", "x", "w", "y")], {}), 1)
    assert operators(written) == ["MatMul", "MatMul"]


def test_weight_read_elsewhere_stays() -> None:
    """A tied embedding: the other reader keeps the dense weight."""
    nodes = [
        helper.make_node("Gather", ["w", "i"], ["e"]),
        helper.make_node("Transpose", ["w"], ["t"]),
        matmul("head", "e", "t", "y"),
    ]
    original = xy(nodes, {"w": W, "i": np.array([1, 3])})
    written = assert_rewritten(original, 1)
    assert operators(written) == ["Gather", "MatMul", "MatMul"]
    assert "w" in {tensor.name for tensor in written.graph.initializer}


def test_shared_weight_stays_shared() -> None:
    nodes = [matmul("first", "x", "w", "h"), helper.make_node("Relu", ["h"], ["r"]), matmul("second", "r", "w", "y")]
    graph = Graph(xy(nodes, {"w": W}))
    found, kept = layers(graph)
    assert not kept
    assert found[0].nodes == ("first", "second")
    written = assert_rewritten(xy(nodes, {"w": W}), 1)
    names = [tensor.name for tensor in written.graph.initializer]
    assert names == ["first/output_0/weight", "first/output_1/weight"]
    assert [n.name for n in written.graph.node] == [
        "first/output_0",
        "first/output_1",
        "",
        "second/output_0",
        "second/output_1",
    ]


def test_weight_shared_with_another_geometry_makes_two_layers() -> None:
    kernel = RNG.standard_normal((3, 3, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["a"], name="near", pads=[1] * 4),
        helper.make_node("Conv", ["x", "k"], ["b"], name="far", pads=[2] * 4, dilations=[2, 2]),
        helper.make_node("Add", ["a", "b"], ["y"]),
    ]
    shape = [1, 3, 7, 7]
    original = model(nodes, [value("x", shape)], [value("y", shape)], {"k": kernel})
    assert_rewritten(original, 2, {"x": RNG.standard_normal(shape).astype(np.float32)})


def test_output_read_many_times_and_by_the_caller() -> None:
    nodes = [
        matmul("m", "x", "w", "h"),
        helper.make_node("Relu", ["h"], ["a"]),
        helper.make_node("Add", ["h", "a"], ["y"]),
    ]
    original = model(nodes, [value("x", [2, 4])], [value("y", [2, 4]), value("h", [2, 4])], {"w": W})
    assert layers(Graph(original))[0][0].form.activation is None
    assert_rewritten(original, 1)


def test_duplicate_and_missing_names() -> None:
    nodes = [
        matmul("same", "x", "w", "a"),
        matmul("same", "a", "v", "b"),
        matmul("", "b", "u", "c"),
        matmul("", "c", "t", "y"),
    ]
    original = xy(nodes, {name: W + i for i, name in enumerate("wvut")})
    assert [layer.key for layer in layers(Graph(original))[0]] == ["same@a", "same@b", "c", "y"]
    written, _ = rewritten(original)
    names = [node.name for node in written.graph.node]
    assert len(set(names)) == len(names) == 8
    # onnxruntime refuses the original: two nodes of one name.
    expected = reference(original, {"x": X})
    assert relative_error(expected, outputs(written, {"x": X})[0]) < 1e-5


def test_rewriting_the_result_again() -> None:
    original = xy([matmul("m", "x", "w", "y")], {"w": W})
    once = assert_rewritten(original, 1)
    twice = assert_rewritten(once, 2)
    assert [n.name for n in twice.graph.node] == [f"m/output_{i}/output_{j}" for i in (0, 1) for j in (0, 1)]


def test_old_models_list_every_initializer_as_input() -> None:
    node = matmul("m", "x", "w", "y")
    original = model([node], [value("x", [2, 4]), value("w", [4, 4])], [value("y", [2, 4])], {"w": W}, 8, 3)
    written = assert_rewritten(original, 1)
    assert [v.name for v in written.graph.input] == ["x"]


def test_initializers_a_caller_may_override_are_kept() -> None:
    node = matmul("m", "x", "w", "y")
    original = model([node], [value("x", [2, 4]), value("w", [4, 4])], [value("y", [2, 4])], {"w": W})
    found, kept = layers(Graph(original))
    assert not found
    assert [entry.reason for entry in kept] == ["its weight 'w' is a graph input that a caller may override"]


def body(
    name: str, inputs: Sequence[str], nodes: Sequence[NodeProto], results: Sequence[str], **weights
) -> onnx.GraphProto:
    tensors = [numpy_helper.from_array(array, key) for key, array in weights.items()]
    kinds = {"i": (TensorProto.INT64, []), "go": (TensorProto.BOOL, []), "go_on": (TensorProto.BOOL, [])}
    values = {
        key: helper.make_tensor_value_info(key, *kinds.get(key, (TensorProto.FLOAT, [2, 4])))
        for key in (*inputs, *results)
    }
    return helper.make_graph(nodes, name, [values[k] for k in inputs], [values[k] for k in results], tensors)


def test_bodies_of_if_with_own_and_captured_weights() -> None:
    then = body("then", [], [matmul("m", "x", "w", "a")], ["a"])
    other = body("else", [], [matmul("m", "x", "v", "b")], ["b"], v=W * 2)
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0),
        helper.make_node("Greater", ["s", "zero"], ["c"]),
        helper.make_node("If", ["c"], ["h"], then_branch=then, else_branch=other, name="branch"),
        matmul("m", "h", "w", "y"),
    ]
    original = xy(nodes, {"w": W, "zero": np.array(0, np.float32)})
    found, _ = layers(Graph(original))
    assert {layer.key: layer.nodes for layer in found} == {
        "m": ("m", "branch.then_branch/m"),
        "branch.else_branch/m": ("branch.else_branch/m",),
    }
    written = assert_rewritten(original, 2, {"x": np.abs(X)})
    assert_rewritten(original, 2, {"x": -np.abs(X)})
    assert "w" not in {tensor.name for tensor in written.graph.initializer}


def test_body_of_loop_with_a_transposed_captured_weight() -> None:
    nodes = [
        matmul("inner", "h", "t", "m"),
        helper.make_node("Tanh", ["m"], ["h_next"]),
        helper.make_node("Identity", ["go"], ["go_on"]),
    ]
    loop = body("loop", ["i", "go", "h"], nodes, ["go_on", "h_next"])
    outer = [
        helper.make_node("Transpose", ["w"], ["t"]),
        helper.make_node("Loop", ["n", "yes", "x"], ["y"], body=loop, name="loop"),
    ]
    original = xy(outer, {"w": W, "n": np.array(3), "yes": np.array(True)})
    written = assert_rewritten(original, 1)
    assert operators(written) == ["Loop"]


def test_body_of_scan_with_a_constant_node() -> None:
    shapes = {"h": [4], "e": [4], "h_next": [4], "out": [4]}
    values = {name: value(name, shape) for name, shape in shapes.items()}
    nodes = [
        constant("w", W),
        matmul("", "e", "w", "p"),
        helper.make_node("Add", ["p", "h"], ["h_next"]),
        helper.make_node("Identity", ["h_next"], ["out"]),
    ]
    scan = helper.make_graph(nodes, "scan", [values["h"], values["e"]], [values["h_next"], values["out"]])
    outer = [helper.make_node("Scan", ["start", "x"], ["end", "y"], body=scan, num_scan_inputs=1)]
    original = xy(outer, {"start": np.zeros(4, np.float32)})
    assert [layer.key for layer in layers(Graph(original))[0]] == ["#0.body/p"]
    assert_rewritten(original, 1)


def test_name_in_a_body_hides_the_outer_weight() -> None:
    """The loop's own state is called like an initializer outside: it is no constant."""
    nodes = [matmul("inner", "x", "w2", "m"), helper.make_node("Identity", ["go"], ["go_on"])]
    loop = body("loop", ["i", "go", "w2"], nodes, ["go_on", "m"])
    for tensor in (*loop.input, *loop.output):
        if tensor.name in {"w2", "m"}:
            tensor.CopyFrom(value(tensor.name, [4, 4]))
    outer = [helper.make_node("Loop", ["n", "yes", "w"], ["y"], body=loop)]
    original = model(
        outer, [value("x", [4, 4])], [value("y", [4, 4])], {"w": W, "n": np.array(3), "yes": np.array(True)}
    )
    found, kept = layers(Graph(original))
    assert not found
    assert [entry.reason for entry in kept] == ["both operands are activations"]
