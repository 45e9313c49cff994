"""The walk holds what onnxruntime computes in the whole model, and no more than what is still read."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from builders import model, value
from chains import outputs
from onnx import ModelProto, TensorProto, ValueInfoProto
from roads import bodies, node, shared
from walks import branching, embedding, residual, sequences, stopping, weight

from onnx_lowrank.calibration.stops import obstacles
from onnx_lowrank.calibration.walk import CannotCutError, Front, Route, route
from onnx_lowrank.errors import InputError
from onnx_lowrank.graph.layers import layers
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.plan import MEMORY_LIMIT
from onnx_lowrank.target import Target

RNG = np.random.default_rng(4)
TARGET = Target(threads=1)
Feeds = Mapping[str, np.ndarray]


def feeds(name: str) -> list[Feeds]:
    """Batches of several sizes."""
    if name == "residual":
        return [{"image": RNG.standard_normal((n, 3, 8, 8)).astype(np.float32)} for n in (1, 3, 2)]
    if name == "branching":
        return [{"x": RNG.standard_normal((n, 6)).astype(np.float32)} for n in (4, 1, 2)]
    return [{"ids": RNG.integers(0, 20, (n, t))} for n, t in ((2, 5), (1, 9), (3, 1))]


MODELS = {"residual": residual, "branching": branching, "embedding": embedding}


def everything(proto: ModelProto, names: list[str], fed: Feeds) -> dict[str, np.ndarray]:
    """Values of any tensors of the main graph, in a run of the whole model."""
    whole = ModelProto()
    whole.CopyFrom(proto)
    del whole.graph.output[:]
    whole.graph.output.extend(ValueInfoProto(name=name) for name in names)
    return dict(zip(names, map(np.asarray, outputs(whole, fed)), strict=True))


def path(proto: ModelProto) -> Route:
    graph, found = stopping(proto)
    return route(graph, {key: stop.operand for key, stop in found.items()})


@pytest.mark.parametrize("name", MODELS)
def test_the_front_holds_the_values_of_the_whole_model(name: str, tmp_path: Path) -> None:
    proto, given = MODELS[name](), feeds(name)
    graph, found = stopping(proto)
    way = route(graph, {key: stop.operand for key, stop in found.items()})
    front = Front(tmp_path, TARGET)
    for fed in given:
        front.put(fed)
    inputs = set(given[0])
    names = sorted({n for held in way.fronts for n in held} | {n for cut in way.cuts for n in (cut.x, cut.y)})
    wanted = [everything(proto, [n for n in names if n not in inputs], fed) | dict(fed) for fed in given]
    heard: dict[str, int] = {}
    for number, held in enumerate(way.fronts):
        cut = way.cuts[number - 1] if number else None

        def hear(batch: int, y: np.ndarray, cut: object = cut) -> None:
            assert cut is not None
            tensor = str(cut.y)  # pyright: ignore[reportAttributeAccessIssue]
            np.testing.assert_allclose(y, wanted[batch][tensor], rtol=1e-5, atol=1e-5)
            heard[tensor] = heard.get(tensor, 0) + 1

        front.advance(graph, held, None if cut is None else cut.y, None if cut is None else hear)
        assert set(front.types) == set(held)
        for tensor in held:
            for batch, fed in enumerate(wanted):
                np.testing.assert_allclose(front.value(tensor, batch), fed[tensor], rtol=1e-5, atol=1e-5)
        assert len(list(tmp_path.iterdir())) == len(held) * len(given)
        if number < len(way.cuts):
            assert way.cuts[number].x in held
            session = front.open(graph, way.beyond(number))
            for batch, got in front.run(session):
                expected = everything(proto, way.beyond(number), given[batch])
                for tensor in expected:
                    np.testing.assert_allclose(got[tensor], expected[tensor], rtol=1e-4, atol=1e-5)
    assert heard == {cut.y: len(given) for cut in way.cuts}


@pytest.mark.parametrize("name", MODELS)
def test_a_part_of_the_batches_can_be_run(name: str, tmp_path: Path) -> None:
    proto, given = MODELS[name](), feeds(name)
    graph, way = stopping(proto)[0], path(proto)
    front = Front(tmp_path, TARGET)
    for fed in given:
        front.put(fed)
    assert front.batches() == 3
    session = front.open(graph, list(way.outputs))
    assert [batch for batch, _ in front.run(session, {2, 0})] == [0, 2]


def test_cuts_and_sums_of_a_residual_network() -> None:
    cuts = {cut.key: cut for cut in path(residual()).cuts}
    assert list(cuts) == ["stem", "one/a", "one/b", "two/beside", "two/a", "head"]
    assert [cut.relu for cut in cuts.values()] == [True, True, True, False, True, False]
    assert {key: cut.beside for key, cut in cuts.items() if cut.beside} == {"one/b": "h0", "two/a": "a4"}


def test_levels_of_outputs_and_fronts() -> None:
    way = path(branching())
    assert [cut.key for cut in way.cuts] == ["first", "second", "third", "fourth"]
    assert dict(way.outputs) == {"early": 1, "e": 3, "y": 4, "late": 4}
    assert way.beyond(0) == ["early", "e", "y", "late"]
    assert way.beyond(1) == ["e", "y", "late"]
    assert way.beyond(3) == ["y", "late"]
    assert set(way.fronts[0]) == {"x"}
    assert set(way.fronts[1]) == {"x", "a", "early"}
    assert set(way.fronts[2]) == {"x", "early", "i"}
    assert set(way.fronts[3]) == {"left", "right"}
    assert way.fronts[4] == ()


def test_an_input_that_is_an_output_and_constants_that_are_outputs(tmp_path: Path) -> None:
    nodes = [node("MatMul", "x w", "y", "only"), node("Identity", "k", "c")]
    weights = {"w": weight(6, 6), "k": np.ones(2, np.float32)}
    ends = [value("x", ["N", 6]), value("y", ["N", 6]), value("c", [2])]
    proto = model(nodes, ends[:1], ends, weights)
    way = path(proto)
    assert dict(way.outputs) == {"x": 0, "y": 1, "c": -1}
    assert way.beyond(0) == ["y"]
    front = Front(tmp_path, TARGET)
    front.put({"x": np.ones((2, 6), np.float32)})
    ((_, got),) = front.run(front.open(stopping(proto)[0], list(way.outputs)))
    assert np.array_equal(got["x"], np.ones((2, 6)))
    assert np.array_equal(got["c"], np.ones(2))


def test_layers_in_bodies_and_layers_of_several_nodes_are_no_stops() -> None:
    assert not stopping(bodies())[1]
    assert list(stopping(shared())[1]) == ["other"]


def reasons(proto: ModelProto, most: int = MEMORY_LIMIT) -> dict[str, str]:
    graph = Graph(proto)
    return obstacles(graph, layers(graph)[0], most)


def test_it_is_said_why_a_layer_is_no_stop() -> None:
    body = "it is in the body of an If, Loop or Scan"
    assert set(reasons(bodies()).values()) == {body}
    assert list(reasons(shared()).values()) == ["its weight is used by 3 nodes"]
    nodes = [node("MatMul", "x w", "b", "first"), node("Gemm", "x v b", "y", "second")]
    computed = model(nodes, [value("x", [3, 6])], [value("y", [3, 6])], {"w": weight(6, 6), "v": weight(6, 6, seed=1)})
    assert list(reasons(computed).values()) == ["its bias is not one constant value per output"]
    assert reasons(embedding()) == {}
    assert reasons(residual(), 8 * 30**2) == {}, "outputs are few: the row space is small"
    too_large = "its moments would take 1152 bytes, and --memory-limit is 968"
    names = ("stem", "one/a", "one/b", "two/a", "two/beside")
    assert reasons(residual(), 8 * 11**2) == dict.fromkeys(names, too_large)


def test_a_layer_with_an_input_that_never_changes_is_passed_by() -> None:
    assert [cut.key for cut in path(embedding()).cuts] == ["words", "last"]


def test_a_sum_with_a_constant_is_no_reason_to_relax() -> None:
    nodes = [node("MatMul", "x w", "m", "only"), node("Add", "m c", "s"), node("Relu", "s", "y")]
    weights = {"w": weight(6, 6), "c": np.ones(6, np.float32)}
    (cut,) = path(model(nodes, [value("x", ["N", 6])], [value("y", ["N", 6])], weights)).cuts
    assert (cut.beside, cut.relu) == (None, False)


def test_sequences_cannot_be_carried(tmp_path: Path) -> None:
    graph, way = stopping(sequences(6))[0], path(sequences(6))
    front = Front(tmp_path, TARGET)
    front.put({"x": np.ones((2, 6), np.float32)})
    with pytest.raises(CannotCutError, match=r"^'parts' holds a list, not an array of numbers$"):
        front.advance(graph, way.fronts[1])


def test_text_cannot_be_carried(tmp_path: Path) -> None:
    front = Front(tmp_path, TARGET)
    with pytest.raises(CannotCutError, match=r"^'words' holds a text, not an array of numbers$"):
        front.put({"words": np.array(["a", "b"], dtype=object)})


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_full_disk_is_told(tmp_path: Path) -> None:
    import resource  # noqa: PLC0415 - not on Windows

    front = Front(tmp_path, TARGET)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    text = (
        r"^got no room for the activations of 0 batches \(.* GB free: .*\); expected room for what each layer reads, "
        "for every sample, twice; free some, write the model to another disk, or take fewer --samples$"
    )
    try:
        with pytest.raises(InputError, match=text):
            front.put({"x": np.ones((64, 64), np.float32)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_half_precision_stays_half(tmp_path: Path) -> None:
    weights = {"w": weight(6, 6).astype(np.float16), "v": weight(6, 6).astype(np.float16)}
    nodes = [node("MatMul", "x w", "a", "first"), node("MatMul", "a v", "y", "second")]
    ends = [value(n, ["N", 6], TensorProto.FLOAT16) for n in ("x", "y")]
    graph, _ = stopping(model(nodes, ends[:1], ends[1:], weights))
    front = Front(tmp_path, TARGET)
    front.put({"x": np.ones((2, 6), np.float16)})
    front.advance(graph, ["a"])
    assert front.types == {"a": TensorProto.FLOAT16}
    assert front.value("a", 0).dtype == np.float16
