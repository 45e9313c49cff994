"""The search: samples, survey, normalization, and the loop that ends with a measured model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builders import model, run_model, value, worst_error
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto
from roads import bodies, low_rank, network, node, on_one_thread, perceptron, save, shared, weight_bearing

from onnx_lowrank.allocators import knapsack
from onnx_lowrank.candidates import Grid
from onnx_lowrank.catalogue import default_decompositions
from onnx_lowrank.data import read_npz
from onnx_lowrank.errors import InputError, LowRankError
from onnx_lowrank.goals import Goal, KeepMacs, LatencyMs, Speedup
from onnx_lowrank.graph import io
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.layer import Layer
from onnx_lowrank.passes.normalize import DEFAULT_NORMALIZE, MEASURED_NORMALIZE
from onnx_lowrank.plan import Choice, Plan
from onnx_lowrank.progress import Phases
from onnx_lowrank.search.analysis import Analysis, analyse
from onnx_lowrank.search.attempt import same
from onnx_lowrank.search.prediction import size_problem
from onnx_lowrank.search.racer import Contestant, Racer
from onnx_lowrank.search.source import read_source
from onnx_lowrank.search.survey import make_samples, normalize, survey
from onnx_lowrank.search.trail import CLOSE, SMALLEST, Trail
from onnx_lowrank.target import InputShapes, Target

pytestmark = pytest.mark.usefixtures("quick")
METHODS = tuple(default_decompositions().values())
ONE = Target(threads=1)


def grid(_layer: Layer) -> Grid:
    return Grid.of_machine(4)


@settings(deadline=None)
@given(st.floats(-8, 2), st.floats(0.5, 4), st.floats(-4, 0))
def test_trail_ends_close_below_the_limit(scale: float, order: float, limit: float) -> None:
    """Whatever power of the loss the error is, a few steps bracket the largest loss within the limit."""
    trail, good, bad = Trail(10**limit), 0.0, math.inf
    for _ in range(60):
        loss = trail.loss
        error = 10**scale * loss ** (1 / order)
        good, bad = (loss, bad) if error <= 10**limit else (good, loss)
        if not trail.learn(loss, error):
            break
    assert bad <= CLOSE * good or trail.loss <= SMALLEST


def test_trail_takes_a_choice_below_what_was_asked_for_as_good_up_to_there() -> None:
    trail = Trail(0.1)
    asked = trail.loss
    assert trail.learn(asked / 10, 0.01)
    assert trail.loss >= 2 * asked


def test_samples_take_the_shapes_of_the_target_or_of_the_data(tmp_path: Path) -> None:
    graph = Graph(network())
    entries = tuple(InputShapes({"image": (batch, 3, 16, 16)}, weight) for batch, weight in ((1, 3.0), (2, 1.0)))
    samples, notes = make_samples(graph, Target(shapes=entries), None, 0)
    assert [(s.feeds["image"].shape[0], s.weight) for s in samples] == [(1, 0.75), (2, 0.25)]
    assert notes == ()
    (guessed,), guessing = make_samples(graph, Target(), None, 0)
    assert guessed.feeds["image"].shape == (1, 3, 16, 16)
    assert len(guessing) == 1
    assert guessing[0].endswith(" is taken as 1x3x16x16; set it with --shape image=1x3x16x16")
    np.savez(tmp_path / "d.npz", image=np.ones((5, 3, 16, 16), np.float32))
    source = read_source(save(network(), tmp_path), tmp_path / "d.npz")
    (given_one,), notes = make_samples(graph, Target(), source.data, 0)
    assert (given_one.feeds["image"].shape, given_one.feeds["image"].max()) == ((1, 3, 16, 16), 1.0)
    assert notes == guessing  # one sample at a time is a guess, too
    with pytest.raises(InputError):
        make_samples(graph, Target(shapes=(InputShapes({"other": (1,)}),)), None, 0)


def racer_of(path: Path, folder: Path, *, as_float32: bool = False) -> Racer:
    samples, _ = make_samples(io.load(path), ONE, None, 0)
    return Racer(ONE, samples, folder, as_float32=as_float32, seconds=0.2)


@pytest.mark.parametrize("build", [network, perceptron, shared, bodies], ids=lambda build: build.__name__)
def test_a_survey_covers_every_weight_bearing_node(build, tmp_path: Path) -> None:
    path = save(build(), tmp_path)
    graph = io.load(path)
    found = survey(graph, racer_of(path, tmp_path), tmp_path)
    covered = [name for layer in found.layers for name in layer.nodes] + [kept.key for kept in found.kept]
    assert len(covered) == len(set(covered))
    assert set(covered) >= set(weight_bearing(build()))
    assert found.macs > 0
    assert not list(tmp_path.glob("traced*"))


def test_normalizing_keeps_what_the_model_computes(tmp_path: Path) -> None:
    """Batch norm and an unfused hard swish; whether fusing the latter pays is measured here."""
    c = 8
    constants = {name: np.array(v, np.float32) for name, v in (("three", 3), ("low", 0), ("six", 6))}
    statistics = {name: np.linspace(0.5, 1.5, c, dtype=np.float32) for name in ("g", "b", "m", "v")}
    weights = {"w": low_rank((c, 3, 3, 3), 3, 0)} | constants | statistics
    nodes = [
        node("Conv", "x w", "h", "conv", pads=[1] * 4),
        node("BatchNormalization", "h g b m v", "n", "bn"),
        node("Add", "n three", "a"),
        node("Clip", "a low six", "k"),
        node("Mul", "n k", "u"),
        node("Div", "u six", "y"),
    ]
    proto = model(nodes, [value("x", [1, 3, 16, 16])], [value("y", [1, c, 16, 16])], weights)
    path = save(proto, tmp_path)
    graph = io.load(path)
    records = normalize(
        graph, DEFAULT_NORMALIZE, MEASURED_NORMALIZE, racer_of(path, tmp_path), tmp_path / "normalized.onnx"
    )
    written = onnx.load(tmp_path / "normalized.onnx")
    assert "BatchNormalization" not in [n.op_type for n in written.graph.node]
    assert any(record.modified for record in records)
    assert written == graph.to_proto()
    feeds = {"x": np.random.default_rng(0).standard_normal((1, 3, 16, 16)).astype(np.float32)}
    assert worst_error(run_model(proto, feeds), run_model(written, feeds)) < 1e-5


def test_a_float32_twin_runs_in_place_of_a_type_without_kernels(tmp_path: Path) -> None:
    path = save(perceptron(TensorProto.BFLOAT16), tmp_path)
    racer = racer_of(path, tmp_path, as_float32=True)
    twin = racer.runnable(path)
    assert twin != path
    assert racer.runnable(path) == twin
    assert racer.fed(racer.samples[0])["x"].dtype == np.float32
    assert racer.race([Contestant(path, "all"), Contestant(path, "extended")]).rounds >= 1


def analysed(goal: Goal, folder: Path, **options: Any) -> Analysis:
    source = read_source(save(network(), folder))
    return analyse(source, on_one_thread(goal, **options), folder, Phases())


def test_the_loop_measures_what_it_returns(tmp_path: Path) -> None:
    found = analysed(Speedup(1.02), tmp_path)
    best = found.outcome.best
    if best.race is None:  # so small a model may gain nothing, beside other work on the machine
        assert not any(candidate.chain for candidate in best.chosen)
        assert "nothing was faster than keeping every layer" in found.outcome.reason
    else:
        assert len(best.race.timings) == 3
        assert found.outcome.reached == (best.race.ratio(0, 2).low >= 1.02)  # the search wants a margin
    assert best.loss == pytest.approx(sum(c.loss for c in best.chosen))
    assert [c.key for c in best.chosen] == [r.layer.key for r in found.rows if r.factorable]
    onnx.checker.check_model(str(best.path), full_check=True)


def test_an_easy_latency_keeps_every_layer(tmp_path: Path) -> None:
    outcome = analysed(LatencyMs(1e4), tmp_path).outcome
    assert (outcome.reached, outcome.reason) == (True, "measured")
    assert all(candidate.chain is None for candidate in outcome.best.chosen)


def test_a_latency_out_of_reach_is_told_with_the_best_found(tmp_path: Path) -> None:
    outcome = analysed(LatencyMs(1e-6), tmp_path).outcome
    assert not outcome.reached
    assert "as fast as the original; the fastest choice of all layers is predicted at " in outcome.reason


def test_a_realised_plan_leaves_the_graph_as_it_was(tmp_path: Path) -> None:
    found = analysed(KeepMacs(0.5), tmp_path)
    before = found.source.graph.to_proto()
    first, record = found.bench.realise(found.outcome.best.plan)
    again, _ = found.bench.realise(found.outcome.best.plan, first.with_name("named.onnx"))
    assert found.source.graph.to_proto() == before
    assert first != again
    assert again.name == "named.onnx"
    assert first.read_bytes() == again.read_bytes()
    assert record.modified
    assert same(found.outcome.best.chosen, knapsack(found_problem(found)))


def found_problem(found: Analysis):
    rows = [r for r in found.rows if r.factorable]
    total, inside = found.ready.survey.macs, sum(r.layer.macs for r in rows)
    return size_problem(rows, KeepMacs(0.5), total, inside)


def test_a_broken_plan_leaves_the_graph_as_it_was(tmp_path: Path) -> None:
    found = analysed(KeepMacs(0.9), tmp_path)
    before = found.source.graph.to_proto()
    with pytest.raises(LowRankError, match="expected a key of this model"):
        found.bench.realise(Plan("", (Choice("nowhere", "nowhere", "svd", (1,)),)))
    assert found.source.graph.to_proto() == before


def test_labels_are_required_where_a_metric_is_to_be_taken(tmp_path: Path) -> None:
    path = tmp_path / "e.npz"
    np.savez(path, image=np.ones((2, 3, 16, 16), np.float32))
    with pytest.raises(InputError) as caught:
        read_source(save(network(), tmp_path), labelled=path)
    assert str(caught.value) == (
        f"got {path} without an array 'label'; expected labelled samples; add labels, or leave --eval out"
    )
    assert len(read_npz(path, read_source(tmp_path / "model.onnx").signature.inputs)) == 2
