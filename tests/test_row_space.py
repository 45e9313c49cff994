"""Layers whose moments do not fit into memory: calibrated and refitted in the row space of their weight, no worse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders import model, run_model, value, worst_error
from formats import EVERY as METHODS
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, numpy_helper
from refits import halved, refitted, samples
from roads import network, node, on_one_thread, ride
from walks import residual

from onnx_lowrank.calibration.input_moments import InputMoments
from onnx_lowrank.calibration.stops import stops
from onnx_lowrank.calibration.unfold import Fed
from onnx_lowrank.calibration.walk import Front, route
from onnx_lowrank.chain import Chain
from onnx_lowrank.goals import KeepMacs
from onnx_lowrank.graph.layers import layers
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.layer import Array, LayerShape
from onnx_lowrank.pipeline import apply
from onnx_lowrank.plan import PassSpec
from onnx_lowrank.row_space import RowSpace, SeenInputs
from onnx_lowrank.row_space import factorized as decomposed
from onnx_lowrank.target import Target

SVD = METHODS["svd"]
SHAPES = st.sampled_from(
    [LayerShape(1, 5, 16), LayerShape(2, 4, 9), LayerShape(1, 6, 3, (3, 3)), LayerShape(2, 3, 4, (3,))]
)


def moment(shape: LayerShape, rng: np.random.Generator) -> tuple[Array, Array]:
    """Rows (300, g, n) of inputs that depend on each other, and their second moment."""
    n = shape.inputs
    mixed = rng.standard_normal((shape.groups, n, n)) * np.geomspace(1, 0.05, n)[:, None]
    rows = np.einsum("rgn,gnm->rgm", rng.standard_normal((300, shape.groups, n)), mixed)
    return rows, np.einsum("rgn,rgm->gnm", rows, rows) / len(rows)


@settings(deadline=None, max_examples=40)
@given(SHAPES, st.integers(0, 20))
def test_calibrated_in_the_row_space_is_calibrated(shape: LayerShape, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(shape.weight)
    rows, gram = moment(shape, rng)
    space = RowSpace.of(weight)
    seen = space.seen(rows)
    inside = decomposed(SVD, weight, np.einsum("rgn,rgm->gnm", seen, seen) / len(seen))
    whole = decomposed(SVD, weight, gram)
    matrix = weight.reshape(shape.groups, shape.out, -1)
    total = float(np.einsum("gsn,gnm,gsm->", matrix, gram, matrix))
    for rank in range(1, SVD.ranks(shape, 1)[-1][0] + 1):
        chain = SVD.chain(shape, (rank,))
        lost = (chain.dense(inside.factors((rank,))) - weight).reshape(matrix.shape)
        error = np.sqrt(max(float(np.einsum("gsn,gnm,gsm->", lost, gram, lost)) / total, 0.0))
        assert inside.error((rank,)) == pytest.approx(whole.error((rank,)), abs=1e-5)
        assert error == pytest.approx(inside.error((rank,)), abs=1e-5)


def test_weak_groups_and_outputs_count() -> None:
    rng, shape = np.random.default_rng(0), LayerShape(2, 4, 12)
    weight = rng.standard_normal(shape.weight)
    weight[1] *= 5e-5
    weight[0, 2] *= 3e-5
    rows, _ = moment(shape, rng)
    rows[:, 1] *= 1e5
    gram = np.einsum("rgn,rgm->gnm", rows, rows) / len(rows)
    space = RowSpace.of(weight)
    (wide,) = space.widened((space.weight,), Chain.unfactored(shape))
    np.testing.assert_allclose(wide, weight, rtol=1e-6)
    np.testing.assert_allclose(
        space.turn.swapaxes(1, 2) @ weight @ weight.swapaxes(1, 2) @ space.turn, 2 * [np.eye(4)], atol=1e-6
    )
    seen = space.seen(rows)
    inside = decomposed(SVD, weight, np.einsum("rgn,rgm->gnm", seen, seen) / len(seen))
    lost = SVD.chain(shape, (2,)).dense(inside.factors((2,))) - weight
    energies = [float(np.einsum("gsn,gnm,gsm->", m, gram, m)) for m in (lost, weight)]
    assert inside.error((2,)) == pytest.approx(
        np.sqrt(energies[0] / energies[1]), rel=1e-3
    )  # the ridge is that of the stronger group
    assert inside.error((2,)) == pytest.approx(SVD.factorize(weight, gram).error((2,)), rel=1e-3)
    mean = rows.mean(axis=0)
    np.testing.assert_allclose(
        np.einsum("gsn,gn->gs", lost, space.mean(seen.mean(axis=0))), np.einsum("gsn,gn->gs", lost, mean), rtol=1e-6
    )


@settings(deadline=None, max_examples=20)
@given(SHAPES, st.integers(0, 20), st.integers(0, 3))
def test_nothing_that_reaches_the_outputs_is_outside(shape: LayerShape, seed: int, dependent: int) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(shape.weight)
    weight[:, :dependent] = weight[:, -1:]  # outputs that are alike
    rows, _ = moment(shape, rng)
    space, matrix = RowSpace.of(weight), weight.reshape(shape.groups, shape.out, -1)
    outputs = np.einsum("gsn,rgn->rgs", matrix, rows)
    np.testing.assert_allclose(np.einsum("gsm,rgm->rgs", space.weight, space.seen(rows)), outputs, atol=1e-6)
    (wide,) = space.widened((space.weight,), Chain.unfactored(shape))
    np.testing.assert_allclose(wide, weight, atol=1e-7)


def test_refit_in_the_row_space_repairs_what_was_lost_upstream(tmp_path: Path) -> None:
    few = 8 * 20**2  # 3x3 convolutions have 108 inputs
    proto, given_samples = residual(), replace(samples(96, "image", (3, 8, 8)), memory_limit=few)
    chosen = halved(layers(Graph(proto))[0])
    feeds = {"image": np.random.default_rng(9).standard_normal((64, 3, 8, 8)).astype(np.float32)}
    errors: dict[bool, float] = {}
    for regress in (True, False):
        made, found = refitted(proto, chosen, given_samples, tmp_path, regress=regress)
        assert {"one/a", "one/b", "two/a"} <= found.keys()
        errors[regress] = worst_error(run_model(proto, feeds), run_model(made, feeds))
    assert errors[True] <= errors[False]


@settings(deadline=None, max_examples=20)
@given(SHAPES, st.integers(0, 20), st.booleans())
def test_seen_inputs_tell_what_outputs_lose(shape: LayerShape, seed: int, centred: bool) -> None:
    rng = np.random.default_rng(seed)
    weight, other = rng.standard_normal((2, *shape.weight))
    rows = moment(shape, rng)[0] + rng.standard_normal((shape.groups, shape.inputs))
    outputs, theirs = (
        np.einsum("gsn,rgn->rgs", each.reshape(shape.groups, shape.out, -1), rows) for each in (weight, other)
    )
    length = np.linalg.norm(outputs - outputs.mean(axis=0) if centred else outputs)
    seen = SeenInputs(weight, rows, centred)
    assert seen.error(other) == pytest.approx(np.linalg.norm(outputs - theirs) / length)
    assert seen.error(weight) == 0
    for scale in (1e19, 1e-25):
        single = SeenInputs(weight, (scale * rows).astype(np.float32), centred)
        assert single.error(other) == pytest.approx(seen.error(other), rel=1e-5)
    dead = SeenInputs(weight, np.zeros_like(rows), centred)
    assert (dead.error(other), dead.error(weight)) == (0, 0)
    same = SeenInputs(weight, np.repeat(rows[:1], 9, axis=0).astype(np.float32), centred)
    assert np.isfinite(same.error(other))
    assert same.error(weight) == 0


@pytest.mark.parametrize("count", [40, 300])
@pytest.mark.parametrize("broken", [False, True])
def test_seen_inputs_are_of_many_places(count: int, broken: bool, tmp_path: Path) -> None:
    """The input is loud in one corner: what a chain loses there is seen, however many samples there are."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((count, 3, 10, 10)).astype(np.float32)
    images[:, :, 6:, 6:] *= 30
    if broken:
        images[1] = np.inf
    weight = rng.standard_normal((5, 3, 3, 3)).astype(np.float32)
    proto = model(
        [node("Conv", "x w", "y", pads=[1, 1, 1, 1])],
        [value("x", ["N", 3, 10, 10])],
        [value("y", ["N", 5, 10, 10])],
        {"w": weight},
    )
    graph = Graph(proto)
    found = stops(graph, layers(graph)[0], 8 * 6**2)
    path = route(graph, {key: stop.operand for key, stop in found.items()})
    front, fitting = Front(tmp_path, Target()), dict[int, Fed]()
    for batch, part in enumerate(np.array_split(images, 8)):
        front.put({"x": part})
        fitting[batch] = Fed(len(part), None)
    seen = InputMoments(found, path, count).seen(0, front, fitting)
    assert seen is not None
    assert 200 <= len(seen.rows) <= 256
    other = weight[None] + rng.standard_normal((1, *weight.shape)) * np.array([0.05, 1, 0.3])[:, None, None]
    feeds = {"x": images[2:]}
    lost, whole = (
        np.linalg.norm(run_model(with_weight(proto, array), feeds)[0]) for array in (weight - other[0], weight)
    )
    assert seen.error(other) == pytest.approx(float(lost / whole), rel=0.2)


def with_weight(proto: ModelProto, weight: Array) -> ModelProto:
    """The network with another weight."""
    changed = ModelProto()
    changed.CopyFrom(proto)
    changed.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight.astype(np.float32), "w"))
    return changed


@pytest.mark.usefixtures("quick")
def test_formats_that_such_moments_say_too_little_of_are_judged_by_outputs(tmp_path: Path) -> None:
    """Never worse with samples than without: the best format for a layer is not lost."""
    rng = np.random.default_rng(0)
    columns = rng.standard_normal((48, 2, 3, 1)) @ rng.standard_normal((48, 2, 1, 3))
    ends = np.einsum("sakl,ac->sckl", columns, rng.standard_normal((2, 32)))  # of two input channels' worth
    weights = {"w": ends, "v": rng.standard_normal((8, 48, 1, 1))}
    nodes = [node("Conv", "x w", "h", pads=[1, 1, 1, 1]), node("Conv", "h v", "y")]
    values = [value("x", ["N", 32, 8, 8])], [value("y", ["N", 8, 8, 8])]
    proto = model(nodes, *values, {name: array.astype(np.float32) for name, array in weights.items()})
    np.savez(tmp_path / "c.npz", x=rng.standard_normal((96, 32, 8, 8)).astype(np.float32))
    asked = on_one_thread(
        KeepMacs(0.2),
        calibration=tmp_path / "c.npz",
        memory_limit=8 * 64**2,
        only=("h",),
        passes=(PassSpec("svd"), PassSpec("svd_input")),
    )
    made = ride(proto, tmp_path, asked)
    (row,) = [row for row in made.report.layers if row.decision == "factorized"]
    assert row.method == "svd_input"
    assert "fitted to the weight alone: 32->48 3x3 has 288 inputs" in row.reason
    assert row.error < 1e-5
    again = tmp_path / "again.onnx"
    apply(made.source, made.plan, again, calibration=tmp_path / "c.npz")
    assert again.read_bytes() == made.out.read_bytes()


@pytest.mark.usefixtures("quick")
def test_a_network_with_layers_too_large_for_moments(tmp_path: Path) -> None:
    proto = network(32)
    images = np.random.default_rng(0).standard_normal((96, 3, 16, 16)).astype(np.float32)
    np.savez(tmp_path / "c.npz", image=images)
    (tmp_path / "free").mkdir()
    free = ride(proto, tmp_path / "free", on_one_thread(KeepMacs(0.6)))
    asked = on_one_thread(KeepMacs(0.6), calibration=tmp_path / "c.npz", memory_limit=8 * 64**2)
    made = ride(proto, tmp_path, asked)
    again = tmp_path / "again.onnx"
    apply(made.source, made.plan, again, calibration=tmp_path / "c.npz")
    assert again.read_bytes() == made.out.read_bytes(), "apply takes moments as the plan was made with"
    factorized = [row for row in made.report.layers if row.decision == "factorized"]
    assert all("not calibrated" not in row.reason for row in factorized)
    assert "svd" in {row.method for row in factorized}
    feeds = {"image": np.random.default_rng(9).standard_normal((64, 3, 16, 16)).astype(np.float32)}
    truth = run_model(proto, feeds)
    assert worst_error(truth, run_model(made.result, feeds)) < worst_error(truth, run_model(free.result, feeds))
