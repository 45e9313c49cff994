"""Refit: never worse where it is judged, exact where nothing is lost, and whole networks come out nearer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders import model, run_model, value
from formats import EVERY as METHODS
from onnx import ModelProto, helper, numpy_helper
from refits import SVD, TARGET, distance, halved, refitted, samples
from roads import network, node, on_one_thread, ride, shared
from walks import branching, embedding, residual, weight

from onnx_lowrank.calibration.samples import divided
from onnx_lowrank.data import Dataset, Part
from onnx_lowrank.goals import KeepMacs
from onnx_lowrank.graph.layers import layers
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.refit import refit
from onnx_lowrank.regression import Chosen

INPUTS = {"residual": ("image", (3, 8, 8)), "branching": ("x", (6,)), "shared": ("x", (96,))}


@pytest.mark.parametrize("name", ["residual", "branching"])
def test_full_rank_leaves_the_outputs_alone(name: str, tmp_path: Path) -> None:
    proto = {"residual": residual, "branching": branching}[name]()
    given = samples(48, *INPUTS[name])
    chosen = [Chosen(layer, SVD, exact) for layer in layers(Graph(proto))[0] if (exact := SVD.exact_rank(layer.shape))]
    made, found = refitted(proto, chosen, given, tmp_path)
    assert found
    feeds = {INPUTS[name][0]: np.random.default_rng(9).standard_normal((4, *INPUTS[name][1])).astype(np.float32)}
    assert distance(proto, made, feeds) < 1e-4


@pytest.mark.parametrize("method", ["svd", "tucker2", "spatial"])
def test_refit_repairs_what_was_lost_upstream(method: str, tmp_path: Path) -> None:
    proto = residual()
    found_layers = layers(Graph(proto))[0]
    if method not in METHODS:
        method = next(name for name in sorted(METHODS) if name.startswith(method))
    chosen = halved(found_layers, METHODS[method])
    given = samples(96, *INPUTS["residual"])
    with_it, found = refitted(proto, chosen, given, tmp_path)
    without, _ = refitted(proto, chosen, given, tmp_path, regress=False)
    feeds = {"image": np.random.default_rng(9).standard_normal((64, 3, 8, 8)).astype(np.float32)}
    assert distance(proto, with_it, feeds) <= distance(proto, without, feeds)
    assert all(one.error <= one.error_before for one in found.values())


def test_every_layer_is_stopped_at_so_that_no_more_is_carried_than_there_was_room_for(tmp_path: Path) -> None:
    graph, told = Graph(residual()), list[tuple[int, int]]()
    chosen = halved(layer for layer in layers(graph)[0] if layer.key == "one/b")
    given = samples(16, *INPUTS["residual"])
    assert refit(graph, chosen, given, TARGET, tmp_path, lambda *done: told.append(done)).keys() == {"one/b"}
    assert told == [(i + 1, 6) for i in range(6)]


@pytest.mark.usefixtures("quick")
def test_layers_that_are_not_factored_keep_their_weights(tmp_path: Path) -> None:
    proto = network(32)
    np.savez(tmp_path / "c.npz", image=np.random.default_rng(0).standard_normal((96, 3, 16, 16)).astype(np.float32))
    made = ride(proto, tmp_path, on_one_thread(KeepMacs(0.6), calibration=tmp_path / "c.npz"))
    kept = [row for row in made.report.layers if row.decision == "kept"]
    assert kept
    assert made.report.factorized
    assert all(row.error_refit is None for row in kept)
    names = {row.name for row in kept}

    def constants(proto: ModelProto) -> dict[str, list[bytes]]:
        held = {tensor.name: numpy_helper.to_array(tensor).tobytes() for tensor in proto.graph.initializer}
        return {n.name: [held[name] for name in n.input if name in held] for n in proto.graph.node if n.name in names}

    assert constants(made.result) == constants(proto)


@pytest.mark.parametrize("wide", ["branch", "layer"])
def test_a_branch_that_is_broadcast_in_front_of_a_relu(wide: str, tmp_path: Path) -> None:
    weights = {"w": weight(16, 8, 1, 1), "v": weight(16, 8, 1, 1, seed=1, scale=30.0)}
    nodes = [
        node("GlobalAveragePool", "image", "pooled"),
        node("Conv", "pooled v" if wide == "layer" else "image v", "other", "other"),
        node("Conv", "image w" if wide == "layer" else "pooled w", "y", "factored"),
        node("Add", "y other", "sum"),
        node("Relu", "sum", "answer"),
    ]
    proto = model(nodes, [value("image", ["N", 8, 8, 8])], [value("answer", ["N", 16, 8, 8])], weights)
    chosen = [Chosen(layer, SVD, (3,)) for layer in layers(Graph(proto))[0] if layer.key == "factored"]
    feeds = {"image": np.random.default_rng(9).standard_normal((64, 8, 8, 8)).astype(np.float32)}
    errors: list[float] = []
    for regress in (True, False):
        made, _ = refitted(proto, chosen, samples(384, "image", (8, 8, 8)), tmp_path, regress=regress)
        truth, got = (run_model(each, feeds)[0] for each in (proto, made))
        errors.append(float(np.linalg.norm(got - truth)))
    assert errors[0] <= errors[1] * 1.01


def test_nothing_to_refit(tmp_path: Path) -> None:
    assert refit(Graph(residual()), [], samples(8, *INPUTS["residual"]), TARGET, tmp_path, lambda *_: None) == {}


def test_batch_size_and_order_of_samples_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proto = residual()
    chosen = halved(layers(Graph(proto))[0])
    images = np.random.default_rng(0).standard_normal((40, 3, 8, 8)).astype(np.float32)
    made: list[ModelProto] = []
    for size, order in ((1, slice(None)), (5, slice(None)), (32, slice(None)), (32, slice(None, None, -1))):
        monkeypatch.setattr("onnx_lowrank.calibration.samples.LARGEST_BATCH", size)
        given = divided(Dataset((Part({"image": images[order]}),), frozenset(), None), 0)[0]
        made.append(refitted(proto, chosen, replace(given, largest_batch=size), tmp_path)[0])
    feeds = {"image": np.random.default_rng(9).standard_normal((8, 3, 8, 8)).astype(np.float32)}
    for other in made[1:]:
        assert distance(made[0], other, feeds) < 1e-5
    assert made[2].SerializeToString() == made[3].SerializeToString()


def test_shared_weights_and_layers_in_bodies_stay_data_free(tmp_path: Path) -> None:
    found = refitted(shared(), halved(layers(Graph(shared()))[0]), samples(40, "x", (96,)), tmp_path)[1]
    assert set(found) == {"other"}


def test_a_constant_input_and_whole_numbers_fed(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 20, (40, 7))
    given = divided(Dataset((Part({"ids": ids}), Part({"ids": ids[:16, :3]})), frozenset(), None), 0)[0]
    chosen = halved(layers(Graph(embedding()))[0])
    _, found = refitted(embedding(), chosen, given, tmp_path)
    assert {"words", "last"} == set(found)


def named_alike() -> ModelProto:
    """Two layers of one name, and an unnamed If whose bodies hold layers, behind nodes that a pass would remove."""
    weights = {name: weight(6, 6, seed=seed) for seed, name in enumerate(("u", "v", "t"))}
    weights["yes"] = np.array(True)  # pyright: ignore[reportArgumentType]
    branches = [
        helper.make_graph([node("MatMul", "b t", f"r{n}", "inside")], f"g{n}", [], [value(f"r{n}", ["N", 6])])
        for n in range(2)
    ]
    nodes = [
        node("Identity", "x", "x1"),
        node("MatMul", "x1 u", "a", "same"),
        node("MatMul", "a v", "b", "same"),
        node("ReduceSum", "b", "total", keepdims=0),
        node("Less", "total total", "choice"),
        node("If", "choice", "y", then_branch=branches[0], else_branch=branches[1]),
    ]
    return model(nodes, [value("x", ["N", 6])], [value("y", ["N", 6])], weights)


def test_names_used_twice_and_bodies_of_nodes_without_one(tmp_path: Path) -> None:
    graph = Graph(named_alike())
    graph.main.rename_input("x1", "x")
    graph.main.remove(graph.main.nodes[0])  # places of nodes are others now than when the file was read
    chosen = halved(layers(graph)[0])
    found = refit(graph, chosen, samples(40, "x", (6,)), TARGET, tmp_path, lambda *_: None)
    assert set(found) == {"same@a", "same@b"}


def test_shapes_that_depend_on_values(tmp_path: Path) -> None:
    weights = {"u": weight(6, 6), "v": weight(6, 6, seed=1), "zero": np.array(0, np.float32)}
    nodes = [
        node("MatMul", "x u", "a", "first"),
        node("ReduceSum", "a ax", "s", keepdims=0),
        node("Greater", "s zero", "positive"),
        node("Compress", "a positive", "some", axis=0),
        node("MatMul", "some v", "y", "second"),
    ]
    weights["ax"] = np.array([1])  # pyright: ignore[reportArgumentType]
    proto = model(nodes, [value("x", ["N", 6])], [value("y", ["M", 6])], weights)
    chosen = [Chosen(layer, SVD, (1,)) for layer in layers(Graph(proto))[0]]
    _, found = refitted(proto, chosen, samples(40, "x", (6,)), tmp_path)
    assert set(found) == {"first", "second"}
