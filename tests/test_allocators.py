"""Rank rules against brute force on problems small enough to enumerate."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from tables import Choice, by_hand, feasible, loss, one_per_layer, option, problems

from onnx_lowrank.allocators import ALLOCATORS
from onnx_lowrank.allocators.energy import energy
from onnx_lowrank.allocators.equal_error import spectral_error
from onnx_lowrank.allocators.full_rank import full_rank
from onnx_lowrank.allocators.knapsack import knapsack
from onnx_lowrank.allocators.minimax import minimax
from onnx_lowrank.candidates import Candidate, Problem, loss_of


@settings(deadline=None, max_examples=150)
@given(problems())
def test_knapsack_is_optimal(problem: Problem) -> None:
    chosen = knapsack(problem)
    assert one_per_layer(problem, chosen)
    possible = feasible(problem)
    if not possible:
        assert problem.total(chosen) == min(map(problem.total, itertools.product(*problem.layers)))
        return
    assert problem.total(chosen) <= problem.budget * (1 + 1e-9)
    assert loss(chosen) == pytest.approx(min(map(loss, possible)), rel=1e-5)


@pytest.mark.parametrize("ruined", [False, True], ids=["as probed", "one option that ruins"])
@pytest.mark.parametrize("share", [0.9, 0.7, 0.5])
def test_knapsack_is_optimal_however_far_losses_are_apart(share: float, ruined: bool) -> None:
    """Probed losses of one network run from 1e-7 to 1; what is not finite counts 1e6."""
    for seed in range(4):
        rng = random.Random(seed)
        rows: list[tuple[Candidate, ...]] = []
        for layer in range(14):
            dense, least = rng.randint(300, 2000), 10 ** rng.uniform(-7, -4.5)
            ladder = [(int(dense * 0.95 * 0.82**step), least * 10 ** (step / 2.5)) for step in range(12)]
            probed = [replace(option(layer, cost, 0.5), probed_loss=loss) for cost, loss in ladder]
            rows.append((option(layer, dense, 0.0), *probed))
        if ruined:
            rows[0] = (*rows[0], replace(option(0, 1, 1.0), probed_loss=1e6))
        budget = int(share * sum(row[0].cost("ms") for row in rows))
        chosen = knapsack(Problem(tuple(rows), "ms", budget))
        assert sum(c.cost("ms") for c in chosen) <= budget
        assert loss_of(chosen) == pytest.approx(least_loss(rows, budget), rel=1e-5)


def least_loss(rows: Sequence[Sequence[Candidate]], budget: int) -> float:
    """By dynamic programming over whole costs."""
    best = np.zeros(budget + 1)
    for row in rows:
        shifted = np.full((len(row), budget + 1), np.inf)
        for index, candidate in enumerate(row):
            cost = int(candidate.cost("ms"))
            shifted[index, cost:] = best[: budget + 1 - cost] + candidate.loss
        best = shifted.min(axis=0)
    return float(best[budget])


def test_what_the_solver_lets_pass_is_within_the_budget() -> None:
    """HiGHS is content with a total that is 1e-7 over."""
    rows = tuple((option(i, 1.0, 0.0), option(i, 0.5 + 1e-8, 0.1), option(i, 0.4, 0.3)) for i in range(4))
    problem = Problem(rows, "ms", 2.0)
    chosen = knapsack(problem)
    assert problem.fits(chosen)
    assert sorted(c.cost("ms") for c in chosen) == [0.4, *[0.5 + 1e-8] * 3]


@pytest.mark.parametrize(
    ("rule", "error"), [(energy, lambda c: c.error), (minimax, spectral_error)], ids=["energy", "minimax"]
)
@settings(deadline=None, max_examples=100)
@given(problem=problems())
def test_equal_error_rules_find_the_smallest_bound(
    rule: Callable[[Problem], Choice], error: Callable[[Candidate], float], problem: Problem
) -> None:
    chosen = rule(problem)
    assert one_per_layer(problem, chosen)
    worst = max(map(error, chosen))
    possible = feasible(problem)
    if not possible:
        assert problem.total(chosen) == problem.total(problem.cheapest())
        return
    assert problem.total(chosen) <= problem.budget
    assert worst == min(max(map(error, choice)) for choice in possible)


@pytest.mark.parametrize("name", ["knapsack", "energy", "minimax"])
@settings(deadline=None, max_examples=40)
@given(problem=problems())
def test_a_larger_budget_never_costs_accuracy(name: str, problem: Problem) -> None:
    measure: dict[str, Callable[[Choice], float]] = {
        "knapsack": loss,
        "energy": lambda chosen: max(c.error for c in chosen),
        "minimax": lambda chosen: max(map(spectral_error, chosen)),
    }
    low = problem.total(problem.cheapest())
    found = [ALLOCATORS[name](Problem(problem.layers, problem.cost, low + extra)) for extra in range(0, 24, 4)]
    losses = [measure[name](chosen) for chosen in found]
    assert all(later <= earlier + 1e-6 for earlier, later in itertools.pairwise(losses))


@pytest.mark.parametrize(
    ("budget", "costs"),
    [
        (30, (10, 10, 10)),
        (26, (6, 10, 10)),  # 0.010
        (23, (6, 10, 7)),  # 0.051, where (3, 10, 10) would cost 0.174
        (21, (6, 5, 10)),  # 0.104, where (3, 10, 7) would cost 0.215
        (18, (6, 5, 7)),  # 0.145
        (15, (3, 5, 7)),  # 0.309, where (6, 5, 2) would cost 1.126
        (9, (3, 4, 2)),  # everything at its cheapest
        (8, (3, 4, 2)),  # out of reach: the cheapest all the same
    ],
)
def test_knapsack_by_hand(budget: float, costs: tuple[float, ...]) -> None:
    chosen = knapsack(Problem(by_hand(), "ms", budget))
    assert tuple(candidate.ms for candidate in chosen) == costs


def test_equal_error_by_hand() -> None:
    """With 18 ms the bound must rise to 0.3: (6, 5, 7). The knapsack agrees; at 15 ms the bound 0.4 gives (3, 5, 7)."""
    assert [c.ms for c in energy(Problem(by_hand(), "ms", 18))] == [6, 5, 7]
    assert [c.ms for c in energy(Problem(by_hand(), "ms", 15))] == [3, 5, 7]
    assert [c.ms for c in energy(Problem(by_hand(), "ms", 14))] == [3, 4, 7]


def test_energy_and_minimax_look_at_their_own_norm() -> None:
    rows = ((option(0, 10, 0.0), option(0, 5, 0.1, 0.9)), (option(1, 10, 0.0), option(1, 5, 0.9, 0.1)))
    assert [c.ms for c in energy(Problem(rows, "ms", 15))] == [5, 10]
    assert [c.ms for c in minimax(Problem(rows, "ms", 15))] == [10, 5]


def test_full_rank_takes_the_exact_candidates_in_turn() -> None:
    first, second = option(0, 12, 0.0, exact=True), option(0, 15, 0.0, exact=True)
    row = (option(0, 10, 0.0), option(0, 5, 0.3), first, second)
    bare = (option(3, 10, 0.0), option(3, 5, 0.3))
    assert full_rank(Problem((row, row, row, bare), "ms", 0.0)) == (first, second, first, bare[0])


@pytest.mark.parametrize("name", ["knapsack", "energy", "minimax"])
def test_costs_of_very_different_size(name: str) -> None:
    """Multiply-accumulates run to 1e10, losses down to 1e-9: the solver's tolerances are absolute."""
    rows = tuple((option(i, 1e10, 0.0), option(i, 1e7 * (i + 1), 1e-5), option(i, 1e6, 1e-3)) for i in range(6))
    budget = 5e8
    chosen = ALLOCATORS[name](Problem(rows, "macs", budget))
    assert sum(c.macs for c in chosen) <= budget
    assert max(c.error for c in chosen) == 1e-5


def test_an_ample_budget_keeps_everything() -> None:
    rows = by_hand()
    assert knapsack(Problem(rows, "ms", math.fsum(row[0].cost("ms") for row in rows))) == tuple(r[0] for r in rows)
