"""The check works without weights, sees what a pass breaks and forgives what the exporter broke."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import everything_model, model, value
from onnx import ModelProto, helper, numpy_helper

from onnx_lowrank.errors import InputError, InvalidResultError
from onnx_lowrank.graph import Graph, check, check_file, inferred_shapes, load, skeleton


def chain_model(declared: int = 8) -> ModelProto:
    """x (n, 32) @ w (32, 8), Relu; the width of y is declared as `declared`."""
    w = np.ones((32, 8), np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], name="layer"),
        helper.make_node("Relu", ["m"], ["y"], name="r"),
    ]
    graph = helper.make_graph(
        nodes, "g", [value("x", ["n", 32])], [value("y", ["n", declared])], [numpy_helper.from_array(w, "w")]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_skeleton_has_no_large_constant_and_passes_the_full_check() -> None:
    graph = Graph(everything_model())
    bare = skeleton(graph)
    onnx.checker.check_model(bare, full_check=True)
    assert [tensor.name for tensor in bare.graph.initializer] == []
    assert [node.op_type for node in bare.graph.node][:2] == ["Identity", "ReduceSum"]
    assert graph.to_proto().SerializeToString() == everything_model().SerializeToString()


def test_large_constants_of_bodies_are_hoisted() -> None:
    big = [numpy_helper.from_array(np.ones((30, 30), np.float32), "w")]
    branches = [
        helper.make_graph([helper.make_node(op, ["x", "w"], ["r"])], op, [], [value("r", [2, 30])], big)
        for op in ("MatMul", "Gemm")
    ]
    proto = model(
        [helper.make_node("If", ["c"], ["y"], name="if", then_branch=branches[0], else_branch=branches[1])],
        [value("x", [2, 30]), value("c", [], onnx.TensorProto.BOOL)],
        [value("y", [2, 30])],
    )
    bare = skeleton(Graph(proto))
    onnx.checker.check_model(bare, full_check=True)
    assert bare.ByteSize() < 1024
    assert len(bare.graph.input) == 4
    shapes = inferred_shapes(Graph(proto))
    assert shapes["if.then_branch/r"] == shapes["if.else_branch/r"] == (2, 30)
    assert shapes["if.then_branch/w"] == (30, 30)


def test_check_names_what_a_pass_broke() -> None:
    graph = Graph(chain_model())
    check(graph)
    graph.main.initializers["w"] = numpy_helper.from_array(np.ones((31, 8), np.float32), "w")
    with pytest.raises(InvalidResultError, match=r"op_type:MatMul, node name: layer.*Incompatible dimensions"):
        check(graph)
    del graph.main.initializers["w"]
    with pytest.raises(InvalidResultError, match="topologically sorted"):
        check(graph)


def test_what_the_exporter_broke_is_tolerated_and_nothing_more(tmp_path: Path) -> None:
    onnx.save(chain_model(declared=9), tmp_path / "m.onnx")
    with pytest.raises(InvalidResultError):
        check(Graph(chain_model(declared=9)))
    graph = load(tmp_path / "m.onnx")
    assert len(graph.tolerated) == 1
    check(graph)
    check_file(tmp_path / "m.onnx", graph.tolerated)
    with pytest.raises(InvalidResultError, match="op_type:Relu"):
        check_file(tmp_path / "m.onnx")
    graph.main.initializers["w"] = numpy_helper.from_array(np.ones((31, 8), np.float32), "w")
    with pytest.raises(InvalidResultError, match="op_type:MatMul"):
        check(graph)


def test_unknown_domain_hides_nothing_else() -> None:
    proto = chain_model()
    proto.opset_import.add(domain="com.microsoft", version=1)
    proto.graph.node.append(helper.make_node("BiasGelu", ["y", "w"], ["z"], domain="com.microsoft"))
    check(Graph(proto))
    proto.graph.node[0].input[1] = "nothing"
    with pytest.raises(InvalidResultError):
        check(Graph(proto))


def test_shapes_follow_the_input_given() -> None:
    proto = chain_model()
    proto.graph.value_info.append(value("m", [1, 8]))  # as an exporter wrote it for batch 1
    graph = Graph(proto)
    assert inferred_shapes(graph, {"x": (5, 32)}) == {"x": (5, 32), "m": (5, 8), "y": (5, 8), "w": (32, 8)}
    assert inferred_shapes(graph)["y"] == ("n", 8)


def test_symbol_bound_by_one_input_is_bound_in_the_others() -> None:
    nodes = [helper.make_node("Add", ["a", "b"], ["s"]), helper.make_node("Shape", ["s"], ["d"])]
    nodes.append(helper.make_node("Expand", ["one", "d"], ["y"]))
    weights = {"one": np.ones(1, np.float32)}
    proto = model(nodes, [value("a", ["n", 3]), value("b", ["n", 3])], [value("y", ["n", 3])], weights)
    shapes = inferred_shapes(Graph(proto), {"a": (4, 3)})
    assert (shapes["b"], shapes["y"]) == ((4, 3), (4, 3))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"z": (1,)}, "got a shape for 'z'; expected one of the inputs ['x']; check the name"),
        ({"x": (1, 31)}, "got shape [1, 31] for input 'x'; expected ['n', 32]; give a shape that fits"),
        ({"x": (1,)}, "got shape [1] for input 'x'; expected ['n', 32]; give a shape that fits"),
    ],
)
def test_shape_that_does_not_fit_is_refused(shapes: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(InputError) as caught:
        inferred_shapes(Graph(chain_model()), shapes)
    assert str(caught.value) == message


def test_what_is_tolerated_may_move_to_another_node(tmp_path: Path) -> None:
    proto = chain_model(declared=9)
    onnx.save(proto, tmp_path / "m.onnx")
    tolerated = load(tmp_path / "m.onnx").tolerated
    for node in proto.graph.node:
        node.name += " rewritten"
    graph = Graph(proto)
    graph.tolerated = tolerated
    check(graph)
    graph.tolerated = frozenset()
    with pytest.raises(InvalidResultError, match="rewritten"):
        check(graph)
