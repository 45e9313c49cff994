"""Local functions with weight-bearing nodes are inlined; the outputs stay the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from builders import value
from onnx import FunctionProto, ModelProto, NodeProto, helper, numpy_helper

from onnx_lowrank.graph import Graph, check, inline_functions, load, save

IMPORTS = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]


def function(name: str, inputs: list[str], nodes: list[NodeProto]) -> FunctionProto:
    return helper.make_function("local", name, inputs, ["out"], nodes, IMPORTS)


def nested_model() -> ModelProto:
    """Block calls Linear, which holds a MatMul; Swish holds no weight; Block is called twice with one weight."""
    linear = function("Linear", ["a", "w"], [helper.make_node("MatMul", ["a", "w"], ["out"], name="inner")])
    swish = [helper.make_node("Sigmoid", ["a"], ["s"]), helper.make_node("Mul", ["a", "s"], ["out"])]
    block = [
        helper.make_node("Linear", ["a", "w"], ["h"], domain="local"),
        helper.make_node("Swish", ["h"], ["out"], domain="local"),
    ]
    nodes = [
        helper.make_node("Block", ["x", "w"], ["h"], domain="local", name="first"),
        helper.make_node("Block", ["h", "w"], ["y"], domain="local", name="second"),
    ]
    w = np.random.default_rng(0).standard_normal((20, 20)).astype(np.float32)
    graph = helper.make_graph(
        nodes, "g", [value("x", ["n", 20])], [value("y", ["n", 20])], [numpy_helper.from_array(w, "w")]
    )
    functions = [function("Block", ["a", "w"], block), linear, function("Swish", ["a"], swish)]
    proto = helper.make_model(graph, opset_imports=IMPORTS, functions=functions, ir_version=8)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def run(proto: ModelProto) -> np.ndarray:
    x = np.random.default_rng(1).standard_normal((3, 20)).astype(np.float32)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def test_functions_with_weights_are_inlined_and_others_stay() -> None:
    graph = Graph(nested_model())
    weight = graph.main.initializers["w"]
    assert inline_functions(graph) == 2
    assert [node.op_type for node in graph.main.nodes] == ["MatMul", "Swish", "MatMul", "Swish"]
    assert [f.name for f in graph.model.functions] == ["Swish"]
    assert graph.main.initializers["w"] is weight
    check(graph)
    np.testing.assert_allclose(run(graph.to_proto()), run(nested_model()), rtol=1e-6)
    assert inline_functions(graph) == 0


def test_external_weights_stay_external(tmp_path: Path) -> None:
    onnx.save(nested_model(), tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    graph = load(tmp_path / "m.onnx")
    assert inline_functions(graph) == 2
    check(graph)
    save(graph, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx.data").stat().st_size == 1600
    np.testing.assert_allclose(run(onnx.load(tmp_path / "out.onnx")), run(nested_model()), rtol=1e-6)
