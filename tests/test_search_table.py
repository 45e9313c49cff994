"""The candidate table: what each layer could become, what it takes, and what a choice is predicted to take."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from roads import network

from onnx_lowrank.candidates import Candidate, Grid
from onnx_lowrank.catalogue import default_decompositions
from onnx_lowrank.chain import Chain
from onnx_lowrank.goals import KeepParams
from onnx_lowrank.graph.check import inferred_shapes
from onnx_lowrank.graph.layers import layers, shapes_as_trace
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.latency.chains import ChainTimer
from onnx_lowrank.latency.pieces import Job
from onnx_lowrank.latency.table import LatencyTable
from onnx_lowrank.layer import Layer
from onnx_lowrank.passes.decompose import decompositions
from onnx_lowrank.passes.decompose.cp import Cp
from onnx_lowrank.passes.decompose.spatial_svd import SpatialSvd
from onnx_lowrank.search.factorizations import FactorizationCache
from onnx_lowrank.search.prediction import KAPPA_RANGE, Prediction, size_problem
from onnx_lowrank.search.table import Row, price, tabulate
from onnx_lowrank.target import Target

pytestmark = pytest.mark.usefixtures("quick")
METHODS = tuple(default_decompositions().values())
ONE = Target(threads=1)


def grid(_layer: Layer) -> Grid:
    return Grid.of_machine(4)


def silent(done: int, total: int) -> None: ...


def network_layers() -> list[Layer]:
    graph = Graph(network())
    return layers(graph, shapes_as_trace(graph, inferred_shapes(graph, {"image": (1, 3, 16, 16)})))[0]


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
@given(prices, prices, st.floats(0.5, 2), st.floats(0.5, 3), st.floats(0, 30))
def test_a_choice_within_the_budget_is_predicted_within_what_was_wanted(
    two: tuple[Layer, Layer], a: list[float], b: list[float], drift: float, kappa: float, wanted: float
) -> None:
    prediction = Prediction([row(two[0], a), row(two[1], b)], a[0] + b[0] + 5, drift, kappa)
    problem = prediction.problem(wanted)
    for options in problem.layers:
        assert options[0].chain is None
        assert all(option.cost("ms") < options[0].cost("ms") for option in options[1:])
    choices = list(itertools.product(*problem.layers))
    for chosen in choices:
        excess = (prediction.ms(chosen) - wanted) / drift
        assert problem.total(chosen) - problem.budget == pytest.approx(excess, abs=1e-9)
    assert prediction.fastest_ms() == pytest.approx(min(map(prediction.ms, choices)))


def test_goals_of_size_see_every_option(two: tuple[Layer, Layer]) -> None:
    slow = row(two[0], [1.0, 5.0, 6.0])
    alone = Row(two[1], (row(two[1], [1.0]).keep,), {"svd": "refused"})
    problem = size_problem([slow, alone], KeepParams(0.5), 16.0, 15.0)
    assert problem.layers == (slow.options,)
    assert problem.budget == 7.0


def test_exact_chains_stay_although_they_are_slower(two: tuple[Layer, Layer]) -> None:
    problem = Prediction([row(two[0], [1.0, 5.0], exact=True)], 3.0).problem(0.0)
    assert [option.exact for option in problem.layers[0]] == [False, True]


def test_the_table_holds_what_each_layer_could_become(tmp_path: Path) -> None:
    found = network_layers()
    told: list[tuple[int, int]] = []
    cache = FactorizationCache(1 << 30, tmp_path)
    rows = tabulate(found, METHODS, grid, cache, lambda done, total: told.append((done, total)))
    assert [r.layer for r in rows] == found
    assert told == [(i + 1, len(found)) for i in range(len(found))]
    by_name = {r.layer.key: r for r in rows}
    assert {o.method for o in by_name["body/2"].options} >= {"keep", "spatial_svd"}
    assert by_name["body/2"].refusals == {}
    assert set(by_name["head"].refusals) == {"svd_input", "spatial_svd", "spatial_svd_reversed", "tucker2", "cp"}
    for r in rows:
        assert r.keep is r.options[0]
        assert r.keep.method == "keep"
        assert r.factorable == (len(r.options) > 1)
        accepted = {method.name for method in METHODS} - set(r.refusals)
        for name in accepted:
            assert sum(option.method == name for option in r.options) <= 12
    assert set(cache) == {(r.layer.key, m.name) for r in rows for m in METHODS if m.name not in r.refusals}


def test_depthwise_stages_fill_channel_blocks_for_goals_of_size_too(tmp_path: Path) -> None:
    cache = FactorizationCache(1 << 30, tmp_path)
    methods = (Cp(sweeps=3), SpatialSvd())
    (wide,) = (layer for layer in network_layers() if layer.key == "body/2")
    rows = tabulate([wide], methods, lambda layer: Grid.of_size(layer.shape, 16), cache, silent)
    ranks = {name: {o.rank[0] for r in rows for o in r.options if o.method == name} for name in ("cp", "spatial_svd")}
    assert ranks["cp"]
    assert all(rank % 16 == 0 or 16 % rank == 0 for rank in ranks["cp"])
    assert any(rank % 16 for rank in ranks["spatial_svd"])


def test_exact_ranks_only(tmp_path: Path) -> None:
    rows = tabulate(network_layers(), METHODS, grid, FactorizationCache(1 << 30, tmp_path), silent, exact_only=True)
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
    rows = tabulate(found, (decompositions()["svd"],), grid, FactorizationCache(1 << 30, tmp_path), silent)
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


def test_a_layer_that_cannot_be_timed_says_so_for_every_format(two: tuple[Layer, Layer], tmp_path: Path) -> None:
    class Lame(ChainTimer):
        def price(self, jobs: Sequence[Job], progress: object = None) -> list[float | None]:
            return [None if job.chain is None and job.layer is two[0] else 1.0 for job in jobs]

    with LatencyTable(tmp_path / "table.db") as table:
        first, second = price([row(layer, (2.0, 1.0)) for layer in two], Lame(ONE, table), silent)
    assert first.options == (first.keep,)
    assert first.refusals == {"svd": "its own latency could not be measured"}
    assert len(second.options) == 2
    assert second.refusals == {}
