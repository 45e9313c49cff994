"""Editing: snapshots, pruning, names, and initializers that are also inputs."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
from builders import everything_model, model, value
from onnx import ModelProto, helper

from onnx_lowrank.graph import Graph, check


def test_restore_undoes_every_edit() -> None:
    graph = Graph(everything_model())
    before = graph.to_proto().SerializeToString(deterministic=True)
    snapshot = graph.snapshot()
    for _ in range(2):
        graph.model.metadata_props[0].value = "edited"
        graph.main.proto.name = "edited"
        for scope in graph.scopes():
            scope.initializers.clear()
            for node in scope.nodes:
                node.doc_string = "edited"
        graph.main.remove(graph.main.nodes[0])
        graph.restore(snapshot)
        assert graph.to_proto().SerializeToString(deterministic=True) == before


def test_snapshot_shares_weights() -> None:
    graph = Graph(everything_model())
    weight = graph.main.initializers["w"]
    graph.restore(graph.snapshot())
    assert graph.main.initializers["w"] is weight


def test_edits_in_bodies_are_written() -> None:
    graph = Graph(everything_model())
    then_branch = list(graph.scopes())[1]
    then_branch.nodes[0].doc_string = "edited"
    assert graph.to_proto().graph.node[5].attribute[1].g.node[0].doc_string == "edited" or (
        graph.to_proto().graph.node[5].attribute[0].g.node[0].doc_string == "edited"
    )


def test_free_names_are_free_everywhere() -> None:
    graph = Graph(everything_model())
    assert [graph.free_name(name) for name in ("shift", "new", "new", "choice")] == [
        "shift_1",
        "new",
        "new_1",
        "choice_1",
    ]


def test_prune_drops_what_nothing_reads_and_keeps_the_rest() -> None:
    graph = Graph(everything_model())
    graph.prune()
    assert graph.to_proto().SerializeToString() == everything_model().SerializeToString()
    graph.main.nodes[2].input[1] = graph.main.add_initializer("factor", np.ones((20, 20), np.float32))
    graph.main.touch()
    graph.prune()
    assert list(graph.main.initializers) == ["factor"]
    assert [value.name for value in graph.main.proto.input] == ["x", "c"]
    check(graph)


def old_model() -> ModelProto:
    """IR version 3, where every initializer has to be listed as an input."""
    weights = {"w": np.full((4, 4), 0.5, np.float32), "b": np.ones(4, np.float32)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Add", ["m", "b"], ["y"])]
    inputs = [value("x", ["n", 4]), value("w", [4, 4]), value("b", [4])]
    return model(nodes, inputs, [value("y", ["n", 4])], weights, opset=8, ir_version=3)


def test_initializer_can_be_added_to_an_old_model() -> None:
    graph = Graph(old_model())
    assert [value.name for value in graph.feeds] == ["x"]
    assert graph.main.constant_source("w") is not None
    graph.main.nodes[0].input[1] = graph.main.add_initializer("factor", np.full((4, 4), 0.5, np.float32))
    graph.main.touch()
    graph.prune()
    check(graph)
    feeds = {"x": np.arange(8, dtype=np.float32).reshape(2, 4)}
    before, after = (
        np.asarray(onnxruntime.InferenceSession(proto.SerializeToString()).run(None, feeds)[0])
        for proto in (old_model(), graph.to_proto())
    )
    np.testing.assert_array_equal(before, after)
    assert (graph.model.ir_version, graph.opset) == (4, 8)
    assert list(graph.main.initializers) == ["b", "factor"]


def test_constants_are_found_through_scopes_and_attributes() -> None:
    shape = helper.make_node("Constant", [], ["axes"], value_ints=[1, 2])
    body = helper.make_graph([helper.make_node("Identity", ["axes"], ["r"])], "b", [], [value("r", [2], 7)])
    choice = helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)
    proto = model([shape, choice], [value("c", [], onnx.TensorProto.BOOL)], [value("y", [2], 7)])
    graph = Graph(proto)
    inner = list(graph.scopes())[1]
    array = inner.array("axes")
    assert array is not None
    assert array.tolist() == [1, 2]
    assert inner.array("c") is None
    assert all(node is graph.main.nodes[1] for node in graph.main.consumers("axes"))
    assert graph.main.sole_consumer("axes") is None  # both bodies read it
    graph.main.rename_input("axes", "other")
    assert list(inner.nodes[0].input) == ["other"]
