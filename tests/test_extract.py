"""A part of a model computes what the whole model does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import everything_model, model, value
from chains import outputs, relative_error
from onnx import ModelProto, TensorProto, helper
from roads import bodies, node, save_external
from walks import branching, residual, weight

from onnx_lowrank.graph import io
from onnx_lowrank.graph.extract import extract, reads
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.runtime import open_session
from onnx_lowrank.target import Target

RNG = np.random.default_rng(5)
FLOAT = TensorProto.FLOAT


def names(proto: ModelProto) -> tuple[list[str], list[str], set[str], list[str]]:
    """Inputs, outputs, initializers and nodes of a part."""
    graph = proto.graph
    ends = [v.name for v in graph.input], [v.name for v in graph.output]
    return *ends, {t.name for t in graph.initializer}, [n.name or n.op_type for n in graph.node]


def test_a_part_has_what_it_needs_and_no_more() -> None:
    part = extract(Graph(residual()), {"image": FLOAT, "h0": FLOAT, "h2": FLOAT}, ["s2", "a4"])
    assert names(part) == (["h2"], ["s2", "a4"], {"w3", "w4"}, ["two/beside", "two/a", "Add"])
    assert part.opset_import[0].version == 17


def test_a_whole_model_in_two_parts() -> None:
    x = RNG.standard_normal((3, 3, 8, 8)).astype(np.float32)
    graph = Graph(residual())
    first = extract(graph, {"image": FLOAT}, ["s1"])
    second = extract(graph, {"s1": FLOAT}, ["logits"])
    assert not set(names(first)[3]) & {"two/a", "head"}
    (middle,) = outputs(first, {"image": x})
    (got,) = outputs(second, {"s1": middle})
    assert relative_error(outputs(residual(), {"image": x})[0], got) < 1e-6


def test_what_bodies_read_from_outside_is_carried_into_the_part() -> None:
    graph = Graph(branching())
    x = RNG.standard_normal((3, 6)).astype(np.float32)
    part = extract(graph, {"b": FLOAT, "a": FLOAT}, ["i"])
    assert sorted(names(part)[0]) == ["a", "b"]
    assert names(part)[2] == {"t", "never"}
    whole = extract(graph, {"x": FLOAT}, ["a", "b", "i"])
    a, b, i = outputs(whole, {"x": x})
    assert relative_error(i, outputs(part, {"a": a, "b": b})[0]) < 1e-6


def test_edits_in_bodies_are_in_the_part() -> None:
    graph = Graph(bodies())
    inner = next(scope for scope in graph.scopes() if any(n.name == "then" for n in scope.nodes))
    made = inner.add_initializer("zeros", np.zeros((96, 96), np.float32))
    inner.nodes[0].input[1] = made
    inner.touch()
    part = extract(graph, {"x": FLOAT, "flag": TensorProto.BOOL}, ["i"])
    (got,) = outputs(part, {"x": np.ones((2, 96), np.float32), "flag": np.array(True)})
    assert not got.any()


def test_reads_of_a_node_include_those_of_its_bodies() -> None:
    graph = Graph(branching())
    uses = reads(graph.main)
    either = next(n for n in graph.main.nodes if n.name == "either")
    assert set(uses[id(either)]) == {"choice", "a", "b", "t"}


def test_an_output_that_is_an_input_and_one_that_is_constant() -> None:
    nodes = [node("Identity", "k", "c"), node("MatMul", "x w", "y")]
    weights = {"w": weight(6, 6), "k": np.ones(2, np.float32)}
    ends = [value("x", ["N", 6]), value("y", ["N", 6]), value("c", [2])]
    graph = Graph(model(nodes, ends[:1], ends, weights))
    x = np.ones((2, 6), np.float32)
    got = outputs(extract(graph, {"x": FLOAT}, ["x", "y", "c"]), {"x": x})
    assert np.array_equal(got[0], x)
    assert np.array_equal(got[2], np.ones(2))


def test_tensors_keep_their_types() -> None:
    part = extract(Graph(branching()), {"choice": TensorProto.BOOL, "a": FLOAT, "b": FLOAT}, ["i"])
    assert {v.name: v.type.tensor_type.elem_type for v in part.graph.input}["choice"] == TensorProto.BOOL
    assert not any(v.type.tensor_type.HasField("shape") for v in part.graph.input)


def test_weights_in_files_stay_there(tmp_path: Path) -> None:
    path = save_external(residual(), tmp_path)
    graph = io.load(path)
    part = extract(graph, {"image": FLOAT}, ["s1"])
    assert all(t.data_location == TensorProto.EXTERNAL for t in part.graph.initializer if t.name in {"w1", "w2"})
    x = RNG.standard_normal((2, 3, 8, 8)).astype(np.float32)
    got = open_session(part.SerializeToString(), Target(threads=1), folder=graph.folder).run({"image": x})
    whole = extract(Graph(residual()), {"image": FLOAT}, ["s1"])
    assert relative_error(outputs(whole, {"image": x})[0], got["s1"]) < 1e-6


def test_sparse_constants_functions_and_metadata_come_along() -> None:
    graph = Graph(everything_model())
    part = extract(graph, {"i": FLOAT}, ["f"])
    assert [t.values.name for t in part.graph.sparse_initializer] == ["s"]
    assert [p.value for p in part.metadata_props] == ["äöü"]
    assert not extract(graph, {"h": FLOAT, "c": TensorProto.BOOL}, ["i"]).graph.sparse_initializer


@pytest.mark.parametrize("ir_version", [3, 8])
def test_initializers_that_are_listed_as_inputs_are_constants(ir_version: int) -> None:
    weights = {"w": weight(6, 6), "v": weight(6, 6, seed=1)}
    nodes = [node("MatMul", "x w", "h", "first"), node("MatMul", "h v", "y", "second")]
    inputs = [value("x", [2, 6]), value("w", [6, 6]), value("v", [6, 6])]
    graph = Graph(model(nodes, inputs, [value("y", [2, 6])], weights, opset=8, ir_version=ir_version))
    part = extract(graph, {"h": FLOAT}, ["y"])
    h = RNG.standard_normal((2, 6)).astype(np.float32)
    session = open_session(part.SerializeToString(), Target(threads=1))
    assert [spec.name for spec in session.signature.inputs] == ["h"]
    np.testing.assert_allclose(session.run({"h": h})["y"], h @ weights["v"], rtol=1e-5, atol=1e-5)


def test_the_graph_is_not_changed() -> None:
    graph = Graph(branching())
    before = graph.to_proto().SerializeToString(deterministic=True)
    extract(graph, {"a": FLOAT, "b": FLOAT}, ["late", "e"])
    assert graph.to_proto().SerializeToString(deterministic=True) == before
    assert onnx.load_from_string(before) == branching()


def test_helper_types_of_unknown_inputs_are_float() -> None:
    part = extract(Graph(residual()), {"h2": 0}, ["a4"])
    assert part.graph.input[0].type == helper.make_tensor_type_proto(FLOAT, None)
