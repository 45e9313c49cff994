"""Rules that measure: never worse than the default by their own measure, within their budget, the same again."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from roads import network, on_one_thread, ride
from tables import Choice, feasible, one_per_layer, option, problems

from onnx_lowrank.allocators import ALLOCATORS, BY_OPTUNA, SEARCHING
from onnx_lowrank.allocators.knapsack import knapsack
from onnx_lowrank.allocators.trials import Trials
from onnx_lowrank.candidates import Candidate, Evidence, Problem
from onnx_lowrank.errors import InputError
from onnx_lowrank.goals import KeepMacs
from onnx_lowrank.recipe import Recipe, parse_passes
from onnx_lowrank.request import settings_of
from onnx_lowrank.search.calibrated import Probes

every_rule = pytest.mark.parametrize("name", sorted(SEARCHING))


class Network:
    """Measures a loss that the predicted one does not know: layers weigh differently, and neighbours add to it."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights, self.calls = weights, list[Choice]()

    def __call__(self, chosen: Sequence[Candidate]) -> float:
        self.calls.append(tuple(chosen))
        losses = [weight * c.error**2 for weight, c in zip(self.weights, chosen, strict=True)]
        return sum(losses) + sum(a * b for a, b in pairwise(losses))


def given_to(problem: Problem, measure: Callable[[Sequence[Candidate]], float], evaluations: int = 40) -> Problem:
    return replace(problem, evidence=Evidence(measure=measure, evaluations=evaluations, seed=3))


@every_rule
@settings(deadline=None, max_examples=15)
@given(problem=problems(), weights=st.lists(st.floats(0.1, 10), min_size=4, max_size=4), evaluations=st.integers(1, 30))
def test_a_search_keeps_to_its_budgets_and_is_never_worse_than_the_default(
    name: str, problem: Problem, weights: list[float], evaluations: int
) -> None:
    measure = Network(weights[: len(problem.layers)])
    chosen = ALLOCATORS[name](given_to(problem, measure, evaluations))
    assert one_per_layer(problem, chosen)
    assert len(measure.calls) == len(set(measure.calls)) <= evaluations
    assert all(problem.fits(call) for call in measure.calls)
    if not feasible(problem):
        assert problem.total(chosen) == problem.total(problem.cheapest())
        return
    assert problem.fits(chosen)
    assert measure(chosen) <= measure(knapsack(problem)) + 1e-12


def misleading() -> Problem:
    """Six layers that look alike; the table says nothing about which of them matter."""
    rows = [
        (option(i, 10, 0.0), *(option(i, cost, error) for cost, error in ((8, 0.1), (6, 0.2), (4, 0.35), (2, 0.6))))
        for i in range(6)
    ]
    return Problem(tuple(rows), "ms", 30)


@every_rule
def test_a_search_finds_what_the_table_does_not_know(name: str) -> None:
    problem, weights = misleading(), (20.0, 1.0, 0.1, 5.0, 0.5, 0.05)
    measure = Network(weights)
    default = measure(knapsack(problem))
    chosen = ALLOCATORS[name](given_to(problem, measure, 100))
    best = min(map(Network(weights), feasible(problem)))
    assert measure(chosen) < 0.6 * default
    assert measure(chosen) <= 6 * best


def as_large_as_real(seed: int) -> tuple[Problem, Network]:
    """14 layers of 41 candidates, losses over six orders of magnitude; the prediction is off by up to 3 either way."""
    rng = np.random.default_rng(seed)
    rows: list[Choice] = []
    for i in range(14):
        dense, (low, high) = 10 ** rng.uniform(0, 1), 10 ** rng.uniform((-7, -1), (-4.5, 0.4))
        places = np.linspace(0, 1, 40)
        losses = low * (high / low) ** places
        costs, errors = dense * 0.95 * 0.05**places, np.sqrt(-np.expm1(-losses))
        cut = [option(i, float(cost), float(error)) for cost, error in zip(costs, errors, strict=True)]
        rows.append((option(i, dense, 0.0), *cut))
    budget = 0.5 * sum(row[0].cost("ms") for row in rows)
    return Problem(tuple(rows), "ms", budget), Network(list(10 ** rng.uniform(-0.5, 0.5, 14)))


@pytest.mark.parametrize("name", ["evolution", "tpe", "reinforcement"])
def test_a_hundred_measurements_gain_on_a_table_as_large_as_real_ones(name: str) -> None:
    gained: list[float] = []
    for seed in range(4):
        problem, measure = as_large_as_real(seed)
        chosen = ALLOCATORS[name](given_to(problem, measure, 100))
        assert len(measure.calls) <= 100
        gained.append(measure(chosen) / measure(knapsack(problem)))
    assert max(gained) < 1
    assert sum(gained) / len(gained) < 0.96


@every_rule
def test_the_same_seed_makes_the_same_search(name: str) -> None:
    first, second = Network((3, 1, 0.1, 5, 0.5, 0.2)), Network((3, 1, 0.1, 5, 0.5, 0.2))
    rule = ALLOCATORS[name]
    assert rule(given_to(misleading(), first)) == rule(given_to(misleading(), second))
    assert first.calls == second.calls


@every_rule
def test_without_layers_or_time_nothing_is_measured(name: str) -> None:
    measure = Network(())
    assert ALLOCATORS[name](given_to(Problem((), "ms", 1.0), measure)) == ()
    late = replace(misleading(), evidence=Evidence(measure=measure, deadline=0.0))
    assert ALLOCATORS[name](late) == knapsack(misleading())
    assert measure.calls == []


@every_rule
def test_without_samples(name: str) -> None:
    text = (
        f"got the rule {name} without samples to measure its choices on; "
        "expected --calibration with enough samples; give more samples, or use another rule"
    )
    with pytest.raises(InputError, match=f"^{re.escape(text)}$"):
        ALLOCATORS[name](misleading())


@pytest.mark.parametrize("name", sorted(BY_OPTUNA))
def test_without_optuna(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    text = (
        f"got the rule {name}, while Optuna is not installed; "
        "expected Optuna to search with; pip install onnx-lowrank[search]"
    )
    for call in (
        lambda: ALLOCATORS[name](given_to(misleading(), Network(()))),
        lambda: settings_of(Recipe(allocator=name, keep_macs=0.5, calibration="x.npz")),
    ):
        with pytest.raises(InputError, match=f"^{re.escape(text)}$"):
            call()


@pytest.mark.parametrize("name", sorted(BY_OPTUNA))
def test_the_log_of_optuna_is_left_as_it_was(name: str) -> None:
    log = logging.getLogger("optuna")
    before = log.level
    ALLOCATORS[name](given_to(misleading(), Network((1.0,) * 6)))
    assert log.level == before


@settings(deadline=None, max_examples=60)
@given(problems(), st.data())
def test_what_is_proposed_fills_the_budget_by_layers_that_nothing_was_asked_of(
    problem: Problem, data: st.DataObject
) -> None:
    trials = Trials(given_to(problem, Network(())), "beam")
    place = tuple(data.draw(st.sampled_from(reach)) for reach in trials.reach)
    fitted = trials.fitted(place)
    assert all(at in reach for at, reach in zip(fitted, trials.reach, strict=True))
    if not trials.fits(trials.start):
        return
    assert trials.fits(fitted)
    moves = list(zip(trials.start, place, fitted, trials.reach, strict=True))
    assert all(got <= asked for start, asked, got, _ in moves if asked < start)
    if any(got < asked for start, asked, got, _ in moves if asked > start):
        assert all(got == reach[0] or got >= start for start, asked, got, reach in moves if asked <= start)
    for n, (start, _, got, reach) in enumerate(moves):
        assert not start <= got < reach[-1] or not trials.fits((*fitted[:n], got + 1, *fitted[n + 1 :]))


# -- The whole road ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (
            Recipe(allocator="beam", calibration="x.npz", max_error=0.1),
            "got --allocator beam with --max-error 0.1; expected a goal of speed or size: every allocation is a search "
            "of its own; give --speedup, --latency-ms, --keep-macs or --keep-params",
        ),
        (
            Recipe(allocator="beam", keep_macs=0.5),
            "got --allocator beam without --calibration; expected samples to measure its choices on; "
            "give --calibration, or leave --allocator beam out",
        ),
        (
            Recipe(evaluations=5),
            "got --evaluations without --allocator; expected a rule of beam, evolution, reinforcement, tpe; "
            "give --allocator, or leave --evaluations out",
        ),
        (
            Recipe(allocator="beam", keep_macs=0.5, calibration="x.npz", evaluations=0),
            "got --evaluations 0; expected at least 1; give another number",
        ),
    ],
)
def test_options_that_cannot_be_meant(asked: Recipe, text: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(text)}$"):
        settings_of(asked)


def test_the_number_of_evaluations_is_handed_on() -> None:
    asked = Recipe(allocator="beam", keep_macs=0.5, calibration="x.npz", evaluations=7)
    assert settings_of(asked).evaluations == 7


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("passes", "told"), [("svd", True), ("svd,grouped_svd", False)])
def test_alds_without_slices_to_choose_from_is_told(tmp_path: Path, passes: str, *, told: bool) -> None:
    asked = on_one_thread(KeepMacs(0.5), allocator="alds", passes=tuple(parse_passes(passes)))
    note = "alds had no format of several slices to choose from: name one, as in --passes svd,grouped_svd"
    assert (note in ride(network(32), tmp_path, asked).report.notes) == told


class KilledError(Exception):
    """Stands for a kill."""


@pytest.mark.usefixtures("quick")
def test_a_killed_search_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    np.savez(tmp_path / "c.npz", image=rng.standard_normal((48, 3, 16, 16)).astype(np.float32))
    asked = on_one_thread(KeepMacs(0.4), calibration=tmp_path / "c.npz", allocator="beam", evaluations=12)
    real, searched, limit = Probes.loss, list[int](), 5

    def counted(self: Probes, replacements: Sequence[object], number: int) -> float:
        if number < 0:
            if len(searched) == limit:
                raise KilledError
            searched.append(len(replacements))
        return real(self, replacements, number)  # pyright: ignore[reportArgumentType] - handed on

    monkeypatch.setattr(Probes, "loss", counted)
    with pytest.raises(KilledError):
        ride(network(32), tmp_path, asked)
    assert len(searched) == limit
    limit = 1000
    first = ride(network(32), tmp_path, asked)
    whole = len(searched)
    again = ride(network(32), tmp_path, asked)
    assert 12 <= whole <= 2 * 12  # the goal's search and its neighbour's, the killed one's measurements included
    assert len(searched) == whole
    assert first.report.goal.reached
    assert first.report.size.macs_after <= 0.4 * first.report.size.macs_before
    assert [c.rank for c in first.plan.layers] == [c.rank for c in again.plan.layers]
