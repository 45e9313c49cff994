"""The search: what is predicted, what is put on the table, and the loop that ends with a measured model."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import model, run_model, value, worst_error
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto
from roads import bodies, network, node, on_one_thread, perceptron, save, shared, weight_bearing

from onnx_lowrank.allocators import knapsack
from onnx_lowrank.candidates import Candidate
from onnx_lowrank.chain import Chain
from onnx_lowrank.data import read_npz
from onnx_lowrank.errors import InputError, LowRankError
from onnx_lowrank.goals import Goal, KeepMacs, LatencyMs, Speedup
from onnx_lowrank.graph import io
from onnx_lowrank.graph.check import inferred_shapes
from onnx_lowrank.graph.layers import layers, shapes_as_trace
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.latency.chains import ChainTimer
from onnx_lowrank.latency.table import LatencyTable
from onnx_lowrank.layer import Layer
from onnx_lowrank.passes.decompose import decompositions
from onnx_lowrank.passes.normalize import DEFAULT_NORMALIZE, MEASURED_NORMALIZE
from onnx_lowrank.plan import Choice, Plan
from onnx_lowrank.progress import Phases
from onnx_lowrank.search.analysis import Analysis, analyse, read_source
from onnx_lowrank.search.factorizations import FactorizationCache
from onnx_lowrank.search.loop import ERROR_PROBES, _bisection, same
from onnx_lowrank.search.prediction import KAPPA_RANGE, Prediction
from onnx_lowrank.search.racer import Contestant, Racer
from onnx_lowrank.search.survey import make_samples, normalize, survey
from onnx_lowrank.search.table import Row, price, tabulate
from onnx_lowrank.target import InputShapes, Target

pytestmark = pytest.mark.usefixtures("quick")
METHODS = tuple(decompositions().values())
ONE = Target(threads=1)
BLOCKS = {"conv": 4, "matmul": 4}


def silent(done: int, total: int) -> None: ...


def network_layers(proto: ModelProto | None = None, image: tuple[int, ...] = (1, 3, 16, 16)) -> list[Layer]:
    graph = Graph(proto or network())
    return layers(graph, shapes_as_trace(graph, inferred_shapes(graph, {graph.main.inputs[0]: image})))[0]


def row(layer: Layer, times: Sequence[float], *, exact: bool = False) -> Row:
    """Made-up prices: the first is the layer's own."""
    chain = Chain.unfactored(layer.shape)
    options = [
        Candidate(layer.key, "svd", (i,), chain, i / 100, i / 100, 1, 1.0, 1.0, ms, exact) for i, ms in enumerate(times)
    ]
    kept = Candidate(layer.key, "keep", (), None, 0.0, 0.0, 2, 2.0, 2.0, times[0])
    return Row(layer, (kept, *options[1:]), {})


@pytest.fixture(scope="module")
def two() -> tuple[Layer, Layer]:
    first, second = network_layers()[1:3]
    return first, second


prices = st.lists(st.floats(0.1, 10), min_size=2, max_size=4)


@settings(deadline=None, max_examples=60)
@given(prices, prices, st.floats(1, 30), st.data())
def test_what_was_measured_is_learnt(
    two: tuple[Layer, Layer], a: list[float], b: list[float], measured: float, data: st.DataObject
) -> None:
    prediction = Prediction([row(two[0], a), row(two[1], b)], a[0] + b[0] + 5)
    chosen = [data.draw(st.sampled_from(r.options)) for r in prediction.rows]
    learned = prediction.learned(chosen, measured)
    chains = sum(c.cost("ms") for c in chosen if c.chain)
    dense = sum(r.keep.cost("ms") for r, c in zip(prediction.rows, chosen, strict=True) if c.chain)
    assert prediction.ms(chosen) == pytest.approx(prediction.normalized_ms - dense + chains)
    if not chains:
        assert learned is prediction
    elif KAPPA_RANGE[0] < learned.kappa < KAPPA_RANGE[1]:
        assert learned.ms(chosen) == pytest.approx(measured)
    else:
        assert learned.kappa in KAPPA_RANGE
        assert abs(learned.ms(chosen) - measured) <= abs(prediction.ms(chosen) - measured) + 1e-9


@settings(deadline=None, max_examples=60)
@given(prices, prices, st.floats(0.5, 3), st.floats(0, 30))
def test_a_choice_within_the_budget_is_predicted_within_what_was_wanted(
    two: tuple[Layer, Layer], a: list[float], b: list[float], kappa: float, wanted: float
) -> None:
    prediction = Prediction([row(two[0], a), row(two[1], b)], a[0] + b[0] + 5, kappa)
    problem = prediction.problem("ms", wanted)
    for options in problem.layers:
        assert options[0].chain is None
        assert all(option.cost("ms") < options[0].cost("ms") for option in options[1:])
    choices = list(itertools.product(*problem.layers))
    for chosen in choices:
        assert problem.total(chosen) - problem.budget == pytest.approx(prediction.ms(chosen) - wanted, abs=1e-9)
    assert prediction.fastest_ms() == pytest.approx(min(map(prediction.ms, choices)))


def test_goals_of_size_see_every_option(two: tuple[Layer, Layer]) -> None:
    slow = row(two[0], [1.0, 5.0, 6.0])
    alone = Row(two[1], (row(two[1], [1.0]).keep,), {"svd": "refused"})
    problem = Prediction([slow, alone], 3.0).problem("params", 7.0)
    assert problem.layers == (slow.options,)
    assert problem.budget == 7.0


def test_exact_chains_stay_although_they_are_slower(two: tuple[Layer, Layer]) -> None:
    problem = Prediction([row(two[0], [1.0, 5.0], exact=True)], 3.0).problem("ms", 0.0)
    assert [option.exact for option in problem.layers[0]] == [False, True]


@settings(deadline=None)
@given(st.floats(0, 1), st.floats(0, 2))
def test_bisection_ends_close_to_the_last_good_place(limit: float, low: float) -> None:
    high = 3.0
    seen: list[float] = []
    for at in _bisection(low, high, lambda: bool(seen) and seen[-1] >= limit):
        seen.append(at)  # noqa: PERF402 - the generator looks at what it has yielded
    if low >= limit:
        assert seen == [low]
    else:
        assert len(seen) == ERROR_PROBES
        good = [at for at in seen if at >= limit]
        assert not good or min(good) - limit <= (high - low) / 2 ** (len(seen) - 1) + 1e-12


def test_the_table_holds_what_each_layer_could_become(tmp_path: Path) -> None:
    found = network_layers()
    told: list[tuple[int, int]] = []
    cache = FactorizationCache(1 << 30, tmp_path)
    rows = tabulate(found, METHODS, BLOCKS, cache, lambda done, total: told.append((done, total)))
    assert [r.layer for r in rows] == found
    assert told == [(i + 1, len(found)) for i in range(len(found))]
    by_name = {r.layer.key: r for r in rows}
    assert {o.method for o in by_name["body/2"].options} >= {"keep", "spatial_svd"}
    assert by_name["body/2"].refusals == {}
    assert set(by_name["head"].refusals) == {"svd_input", "spatial_svd", "spatial_svd_reversed", "tucker2"}
    for r in rows:
        assert r.keep is r.options[0]
        assert r.keep.method == "keep"
        assert r.factorable == (len(r.options) > 1)
        accepted = {method.name for method in METHODS} - set(r.refusals)
        for name in accepted:
            assert sum(option.method == name for option in r.options) <= 12
    assert set(cache) == {(r.layer.key, m.name) for r in rows for m in METHODS if m.name not in r.refusals}


def test_exact_ranks_only(tmp_path: Path) -> None:
    rows = tabulate(network_layers(), METHODS, BLOCKS, FactorizationCache(1 << 30, tmp_path), silent, exact_only=True)
    assert all(option.exact for r in rows for option in r.options[1:])
    assert all(r.factorable for r in rows)


def test_factorizations_beyond_the_limit_are_spilled_and_read_back(tmp_path: Path) -> None:
    found = network_layers()
    small, large = FactorizationCache(1, tmp_path), FactorizationCache(1 << 30, tmp_path)
    svd = decompositions()["svd"]
    made = [small.make(layer, svd) for layer in found]
    assert len(small) == len(found)
    assert len(list(tmp_path.iterdir())) == len(found) - 1
    for layer, one in zip(found, made, strict=True):
        again = small.make(layer, svd, weight=np.zeros(1))
        assert again.error((2,)) == one.error((2,)) == large.make(layer, svd).error((2,))
    assert len(list(tmp_path.iterdir())) == len(found) - 1


def test_prices_are_measured_once_and_remembered(tmp_path: Path) -> None:
    found = network_layers()[2:]
    rows = tabulate(found, (decompositions()["svd"],), BLOCKS, FactorizationCache(1 << 30, tmp_path), silent)
    with LatencyTable(tmp_path / "t.sqlite") as table:
        timer = ChainTimer(ONE, table)
        priced = price(rows, timer, silent)
        assert timer.timed == len(table) == sum(len(r.options) for r in rows if r.factorable)
        assert all((option.ms or 0) > 0 for r in priced for option in r.options if r.factorable)
        warm = ChainTimer(ONE, table)
        assert [r.options for r in price(rows, warm, silent)] == [r.options for r in priced]
        assert warm.timed == 0
    assert [[(o.method, o.rank) for o in r.options] for r in priced] == [
        [(o.method, o.rank) for o in r.options] for r in rows
    ]


def test_samples_take_the_shapes_of_the_target_or_of_the_data(tmp_path: Path) -> None:
    graph = Graph(network())
    entries = tuple(InputShapes({"image": (batch, 3, 16, 16)}, weight) for batch, weight in ((1, 3.0), (2, 1.0)))
    samples, notes = make_samples(graph, Target(shapes=entries), None, 0)
    assert [(s.feeds["image"].shape[0], s.weight) for s in samples] == [(1, 0.75), (2, 0.25)]
    assert notes == ()
    (guessed,), notes = make_samples(graph, Target(), None, 0)
    assert guessed.feeds["image"].shape == (1, 3, 16, 16)
    assert len(notes) == 1
    np.savez(tmp_path / "d.npz", image=np.ones((5, 3, 16, 16), np.float32))
    source = read_source(save(network(), tmp_path), tmp_path / "d.npz")
    (given_one,), notes = make_samples(graph, Target(), source.data, 0)
    assert (given_one.feeds["image"].shape, given_one.feeds["image"].max(), notes) == ((1, 3, 16, 16), 1.0, ())
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
    weights = {"w": network_layers()[0].read()[0, :c].astype(np.float32)} | constants | statistics
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


def analysed(goal: Goal, folder: Path, **options: object) -> Analysis:
    source = read_source(save(network(), folder))
    return analyse(source, on_one_thread(goal, **options), folder, Phases())


def test_the_loop_measures_what_it_returns(tmp_path: Path) -> None:
    found = analysed(Speedup(1.02), tmp_path)
    best = found.outcome.best
    assert best.race is not None
    assert len(best.race.timings) == 3
    assert best.loss == pytest.approx(sum(c.loss for c in best.chosen))
    assert [c.key for c in best.chosen] == [r.layer.key for r in found.rows if r.factorable]
    onnx.checker.check_model(str(best.path), full_check=True)
    assert found.outcome.reached == (best.race.ratio(0, 2).low >= 0.98 * 1.02)


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
    again, _ = found.bench.realise(found.outcome.best.plan, "named.onnx")
    assert found.source.graph.to_proto() == before
    assert first != again
    assert again.name == "named.onnx"
    assert first.read_bytes() == again.read_bytes()
    assert record.modified
    assert same(found.outcome.best.chosen, knapsack(found_problem(found)))


def found_problem(found: Analysis):
    rows = [r for r in found.rows if r.factorable]
    total, inside = found.ready.survey.macs, sum(r.layer.macs for r in rows)
    return Prediction(rows, 1.0).problem("macs", 0.5 * total - (total - inside))


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
