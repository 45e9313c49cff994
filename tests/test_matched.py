"""Matched budgets: which ranks are near one, which candidate is the best within it, and what stands on a front."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders import conv_model
from formats import METHODS
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import conv_layer

from onnx_lowrank.candidates import Candidate
from onnx_lowrank.comparison.compare import APPROACHES
from onnx_lowrank.comparison.model import on_front
from onnx_lowrank.goals import Goal, KeepMacs, KeepParams, Speedup
from onnx_lowrank.graph.check import inferred_shapes
from onnx_lowrank.graph.layers import layers, shapes_as_trace
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.layer import Layer
from onnx_lowrank.search.factorizations import FactorizationCache
from onnx_lowrank.search.matched import (
    AROUND,
    MatchedGrid,
    best_within,
    cost_of,
    highest,
    of_formats,
    share_of,
    worth_pricing,
    worth_pricing_next,
)
from onnx_lowrank.search.table import Row, row_of

GOALS = (KeepMacs(0.5), Speedup(2))
SPECTRAL = ("svd", "spatial_svd", "tucker2")


@pytest.fixture(scope="module")
def layer() -> Layer:
    graph = Graph(conv_model((1, 16, 8, 8), (24, 16, 3, 3), pads=[1] * 4))
    (found,), _ = layers(graph, shapes_as_trace(graph, inferred_shapes(graph)))
    return found


def row(layer: Layer, names: tuple[str, ...], goals: tuple[Goal, ...], cache: FactorizationCache) -> Row:
    return row_of(layer, [METHODS[name] for name in names], MatchedGrid.near(goals, layer.shape, 8), cache)


def timed(row: Row, per_mac: float) -> Row:
    """With a latency in proportion to the MACs; the layer takes 1."""
    options = [replace(o, ms=per_mac * o.macs / row.keep.macs) for o in row.options[1:]]
    return replace(row, options=(row.keep.timed(1.0), *options))


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory) -> FactorizationCache:
    return FactorizationCache(1 << 30, tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("name", SPECTRAL)
@pytest.mark.parametrize("limit", [0.1, 0.3, 0.5, 0.8])
def test_the_best_within_a_budget_is_one_of_the_highest_ranks(layer: Layer, name: str, limit: float) -> None:
    method = METHODS[name]
    made = method.factorize(layer.read())
    sizes = {r: method.chain(layer.shape, r).macs(layer) / layer.macs for r in method.ranks(layer.shape, 1)}
    found = highest(method, sizes, limit)
    within = [rank for rank, size in sizes.items() if size <= limit]
    assert set(found) <= set(within)
    assert min(map(made.error, found)) == pytest.approx(min(map(made.error, within)))
    assert [sizes[rank] for rank in found] == sorted((sizes[rank] for rank in found), reverse=True)
    for rank in within:
        assert any(all(a <= b for a, b in zip(rank, other, strict=True)) for other in found)


def test_ranks_that_arrange_the_weight_differently_do_not_exceed_each_other() -> None:
    sizes = {(2, 4, 4): 0.3, (2, 8, 8): 0.5, (4, 2, 2): 0.2, (4, 4, 4): 0.4, (8, 8, 8): 0.9}
    assert highest(METHODS["block_term"], sizes, 0.5) == [(2, 8, 8), (4, 4, 4)]
    assert highest(METHODS["tucker2"], {(1, 9): 0.3, (3, 3): 0.4, (2, 3): 0.2}, 0.5) == [(3, 3), (1, 9)]


@pytest.mark.parametrize("name", ["cp", "block_term"])
def test_of_fits_by_rank_only_those_near_the_budgets_are_made(
    layer: Layer, name: str, cache: FactorizationCache
) -> None:
    made = row(layer, (name,), GOALS, cache)
    every = METHODS[name].ranks(layer.shape, 1)
    at_most = sum(count for _, count in AROUND) * len(GOALS)
    assert 0 < len(made.options) - 1 <= min(at_most, len(every))
    grid = MatchedGrid.near(GOALS, layer.shape, 8)
    fine = grid.ranks(METHODS[name], layer.shape)
    fitted = grid.fitted(layer, METHODS[name], fine, layer.read())
    sizes = {rank: METHODS[name].chain(layer.shape, rank).macs(layer) for rank in fine}
    tightest = max((r for r in fine if sizes[r] <= 0.5 * layer.macs), key=lambda r: sizes[r])
    assert tightest in fitted
    assert len(fitted) < len(every)


def test_no_format_is_dropped_because_another_is_better(layer: Layer, cache: FactorizationCache) -> None:
    made = row(layer, SPECTRAL, GOALS, cache)
    assert {option.method for option in made.options[1:]} == set(SPECTRAL)
    for goal in GOALS[:1]:
        best = {name: best_within(of_formats([made], [name], timed=False)[0].options[1:], made.keep, goal)
                for name in SPECTRAL}  # fmt: skip
        for name, found in best.items():
            method = METHODS[name]
            assert found is not None
            factorization = method.factorize(layer.read())
            within = [
                r for r in method.ranks(layer.shape, 1) if method.chain(layer.shape, r).macs(layer) <= 0.5 * layer.macs
            ]
            assert found.error == pytest.approx(min(map(factorization.error, within)))


def test_a_handful_of_chains_per_format_and_budget_is_timed(layer: Layer, cache: FactorizationCache) -> None:
    made = row(layer, SPECTRAL, GOALS, cache)
    priced = worth_pricing(made, GOALS)
    assert {option.method for option in priced} == set(SPECTRAL)
    assert all(sum(option.method == name for option in priced) <= len(AROUND) for name in SPECTRAL)
    assert worth_pricing(made, [KeepMacs(0.5), KeepParams(0.5)]) == set()


@pytest.fixture(scope="module")
def wide() -> Row:
    """A layer of 128 channels in three formats at every rank worth a look for speed."""
    weight = np.random.default_rng(0).standard_normal((128, 128, 3, 3)).astype(np.float32)
    layer = conv_layer("wide", weight[None])
    with tempfile.TemporaryDirectory() as folder:
        return row(layer, SPECTRAL, (Speedup(2),), FactorizationCache(1 << 30, Path(folder)))


@pytest.mark.parametrize("name", SPECTRAL)
@pytest.mark.parametrize("per_mac", [0.6, 0.95, 1.03, 1.3])
@pytest.mark.parametrize("times", [1.3, 2, 3])
def test_a_budget_of_speed_is_approached_by_a_few_candidates(
    wide: Row, name: str, per_mac: float, times: float
) -> None:
    goal = Speedup(times)
    (alone,) = of_formats([wide], [name], timed=False)
    ms = {option.name: per_mac * option.macs / wide.keep.macs for option in alone.options}
    known = replace(alone, options=(alone.keep.timed(1.0), *alone.options[1:]))
    wanted = worth_pricing(known, [goal])
    for _ in range(1 + APPROACHES):
        options = [option.timed(ms[option.name]) if option in wanted else option for option in known.options[1:]]
        known = replace(known, options=(known.keep, *options))
        wanted = worth_pricing_next(known, [goal])
    shown = best_within(known.options[1:], known.keep, goal)
    best = best_within([option.timed(ms[option.name]) for option in alone.options[1:]], known.keep, goal)
    assert sum(option.ms is not None for option in known.options[1:]) <= len(AROUND) + APPROACHES
    assert shown is not None
    assert best is not None
    assert shown.error <= 1.02 * best.error


@st.composite
def priced(draw: st.DrawFn) -> list[Candidate]:
    numbers = st.tuples(st.integers(0, 4), st.integers(1, 6), st.integers(1, 6), st.none() | st.integers(1, 6))
    return [
        Candidate("l", "svd", (i,), None, e / 4, e / 4, p, float(m), float(m), None if t is None else float(t))
        for i, (e, m, p, t) in enumerate(draw(st.lists(numbers, max_size=12)))
    ]


@settings(deadline=None, max_examples=60)
@given(priced(), st.sampled_from([KeepMacs(0.5), KeepParams(0.4), Speedup(2), Speedup(1.25)]))
def test_the_best_within_a_budget_is_found_by_looking_at_all(options: list[Candidate], goal: Goal) -> None:
    kept = Candidate("l", "keep", (), None, 0.0, 0.0, 6, 6.0, 6.0, 6.0)
    cost = cost_of(goal)
    within = [o for o in options if (cost != "ms" or o.ms is not None) and o.cost(cost) <= share_of(goal) * 6]
    best = best_within(options, kept, goal)
    if best is None:
        assert not within
    else:
        assert best in within
        assert best.error == min(option.error for option in within)


def test_a_table_of_some_formats_keeps_what_they_said(layer: Layer, cache: FactorizationCache) -> None:
    made = row(layer, ("svd", "tucker2"), GOALS, cache)
    made = replace(made, refusals={"cp": "too small", "svd_input": "no"})
    timed = replace(made, options=(made.keep, *(o.timed(1.0) if i % 2 else o for i, o in enumerate(made.options[1:]))))
    (only,) = of_formats([timed], ["tucker2", "cp"], timed=True)
    assert only.refusals == {"cp": "too small"}
    assert only.keep == made.keep
    assert {(o.method, o.ms) for o in only.options[1:]} == {("tucker2", 1.0)}


@settings(deadline=None, max_examples=60)
@given(st.lists(st.none() | st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=10))
def test_on_a_front_is_what_no_other_beats(points: list[tuple[int, int] | None]) -> None:
    for point, front in zip(points, on_front(points), strict=True):
        others = [p for p in points if p is not None and p != point]
        beaten = point is None or any(np.all(np.less_equal(other, point)) for other in others)
        assert front == (not beaten)
