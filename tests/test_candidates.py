"""Candidates: what a layer could become, and which of it is worth timing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from builders import conv_model
from formats import EVERY
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_lowrank.candidates import FORMAT_SLACK, Candidate, Grid, Problem, candidate, front, keep, worth_timing
from onnx_lowrank.graph.check import inferred_shapes
from onnx_lowrank.graph.layers import layers, shapes_as_trace
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.layer import Layer, LayerShape

METHODS = {name: method for name, method in EVERY.items() if method.refusal(LayerShape(1, 24, 16, (3, 3))) is None}


def option(error: float, padded_macs: float, method: str = "svd", rank: int = 1) -> Candidate:
    return Candidate("layer", method, (rank,), None, error, error, 0, padded_macs, padded_macs)


def one_layer() -> Layer:
    graph = Graph(conv_model((1, 16, 8, 8), (24, 16, 3, 3), pads=[1] * 4))
    (layer,), _ = layers(graph, shapes_as_trace(graph, inferred_shapes(graph)))
    return layer


@st.composite
def tables(draw: st.DrawFn) -> list[Candidate]:
    numbers = st.tuples(st.integers(0, 6), st.integers(1, 6), st.sampled_from(["svd", "tucker2", "spatial_svd"]))
    return [option(e / 6, float(m), name, i + 1) for i, (e, m, name) in enumerate(draw(st.lists(numbers, max_size=20)))]


@settings(deadline=None, max_examples=60)
@given(tables())
def test_front_is_what_nobody_beats(options: list[Candidate]) -> None:
    best = front(options)
    for one in options:
        beaten = any(
            other.error <= one.error
            and other.padded_macs <= one.padded_macs
            and (other.error, other.padded_macs) != (one.error, one.padded_macs)
            for other in options
        )
        assert beaten != any((b.error, b.padded_macs) == (one.error, one.padded_macs) for b in best)
    assert [b.padded_macs for b in best] == sorted({b.padded_macs for b in best})


@settings(deadline=None, max_examples=60)
@given(tables())
def test_what_is_left_out_is_beaten_within_its_method_or_clearly_across(options: list[Candidate]) -> None:
    kept = worth_timing(options, per_method=100)
    assert len(kept) == len(set(kept))
    for one in options:
        if one in kept:
            continue
        mine = [o for o in options if o.method == one.method and o is not one]
        assert any(o.error <= one.error and o.padded_macs <= one.padded_macs for o in mine) or any(
            o.error <= one.error and o.padded_macs * FORMAT_SLACK < one.padded_macs for o in options
        )


def test_thinning_keeps_the_ends_and_spreads_evenly_in_the_logarithm() -> None:
    options = [option(1 / n, float(n), rank=n) for n in range(1, 129)]
    kept = worth_timing(options, per_method=8)
    costs = [c.padded_macs for c in kept]
    assert costs == [1, 2, 4, 8, 16, 32, 64, 128]


def test_thinning_of_few_keeps_all() -> None:
    options = [option(1 / n, float(n), rank=n) for n in range(1, 9)]
    assert worth_timing(options, per_method=8) == options


@pytest.mark.parametrize("name", METHODS)
def test_a_candidate_says_what_its_chain_and_factorization_say(name: str) -> None:
    layer, method = one_layer(), METHODS[name]
    made = method.factorize(layer.read())
    rank = method.ranks(layer.shape, 4)[-1]
    found = candidate(layer, method, made, rank, 4)
    chain = method.chain(layer.shape, rank)
    assert (found.key, found.method, found.rank, found.chain) == ("conv", name, rank, chain)
    assert (found.params, found.macs, found.padded_macs) == (chain.params, chain.macs(layer), chain.macs(layer, 4))
    assert (found.error, found.spectral_error) == (made.error(rank), None)
    assert found.loss == pytest.approx(-math.log(1 - found.error**2))
    assert not found.exact
    exact = method.exact_rank(layer.shape)
    assert exact is None or candidate(layer, method, made, exact, 4).exact


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("size", [False, True], ids=["time", "size"])
def test_what_may_be_chosen_is_made_again_alone(name: str, size: bool) -> None:
    """Same plan, same bytes: `apply` fits one rank, `optimize` has fitted many, and handed out the best of those."""
    layer, method = one_layer(), METHODS[name]
    weight = layer.read() * np.random.default_rng(0).lognormal(0, 1, layer.shape.weight)
    grid = Grid.of_size(layer.shape, 4) if size else Grid.of_machine(4)
    made = method.factorize(weight)
    options = [candidate(layer, method, made, rank, grid.block) for rank in grid.ranks(method, layer.shape)]
    chosen = grid.worth_timing(options)
    assert chosen
    for option in chosen:
        alone = method.factorize(weight).factors(option.rank)
        assert all(np.array_equal(a, b) for a, b in zip(made.factors(option.rank), alone, strict=True))


def test_keep_is_the_layer_itself() -> None:
    layer = one_layer()
    kept = keep(layer)
    assert (kept.method, kept.rank, kept.chain, kept.loss) == ("keep", (), None, 0.0)
    assert (kept.params, kept.macs) == (24 * 16 * 9, 24 * 16 * 9 * 64)


def test_costs() -> None:
    timed = Candidate("a", "svd", (3,), None, 0.5, 0.5, 7, 8.0, 9.0).timed(1.5)
    assert [timed.cost("ms"), timed.cost("macs"), timed.cost("params")] == [1.5, 8.0, 7.0]
    with pytest.raises(ValueError, match=r"^layer: svd \(1,\) was not timed$"):
        option(0.1, 1.0).cost("ms")


def test_problem_sums_and_finds_the_cheapest() -> None:
    cheap, dear = option(0.5, 2.0), option(0.1, 3.0)
    same_price = option(0.4, 2.0)
    problem = Problem(((dear, cheap), (dear, cheap, same_price)), "macs", math.inf)
    assert problem.cheapest() == (cheap, same_price)
    assert problem.total(problem.cheapest()) == 4.0


def test_a_layer_given_up_costs_more_than_many_layers_trimmed_but_no_infinity() -> None:
    assert 30 * option(0.4, 1.0).loss < option(1.0, 1.0).loss < math.inf
    assert option(0.0, 1.0).loss == 0.0


@pytest.mark.parametrize(
    ("sides", "block", "step"), [((32, 64), 16, 1), ((64, 128), 16, 2), ((384, 1536), 16, 16), ((512, 512), 8, 8)]
)
def test_goals_of_size_see_ranks_within_a_block_of_narrow_layers_only(
    sides: tuple[int, int], block: int, step: int
) -> None:
    grid = Grid.of_size(LayerShape(1, *sides, (3, 3)), block)
    assert (grid.step, grid.depthwise_step, grid.block) == (step, block, 1)
