"""What a rank rule is given beside its table."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from tables import Choice, conv_layer, option

from onnx_lowrank.allocators import ALLOCATORS
from onnx_lowrank.candidates import Problem, keep
from onnx_lowrank.search.calibrated import CalibratedTable
from onnx_lowrank.search.rules import rule_for
from onnx_lowrank.search.table import Row
from onnx_lowrank.settings import Settings


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Problem]:
    """What beam and the knapsack are asked."""
    asked: list[Problem] = []

    def rule(problem: Problem) -> Choice:
        asked.append(problem)
        return problem.cheapest()

    for name in ("beam", "knapsack"):
        monkeypatch.setitem(ALLOCATORS, name, rule)
    return asked


ASKED = (100.3, 101.0, 102.1, 80.0)


@pytest.mark.parametrize(("name", "same"), [("beam", True), ("knapsack", False)])
def test_a_search_started_again_is_given_the_same_budget_of_time(name: str, same: bool, seen: list[Problem]) -> None:
    """What is timed again comes out a little otherwise; never more is given, and never less than can be met."""
    bound = rule_for(Settings(allocator=name), [], None)
    layers = tuple((option(i, 50, 0.0), option(i, 20, 0.5)) for i in range(4))
    for budget in ASKED:
        bound(Problem(layers, "ms", budget))
    given = [problem.budget for problem in seen]
    assert (given[0] == given[1]) == same
    assert given[1] != given[2]
    assert given[3] == 80.0  # the cheapest choice takes as much
    assert all(0.99 * asked < budget <= asked for asked, budget in zip(ASKED, given, strict=True))


def test_energies_of_layers_without_samples_are_in_the_unit_of_the_others(seen: list[Problem]) -> None:
    weights = {key: np.full((1, 2, 2, 1, 1), size, np.float32) for key, size in zip("abcd", (1, 2, 3, 4), strict=True)}
    rows = [Row(layer, (keep(layer),), {}) for layer in (conv_layer(key, weight) for key, weight in weights.items())]
    calibrated = SimpleNamespace(energies={"a": 4.0, "b": 80.0, "c": 36.0 * 9}, measure=None)
    for table in (None, cast("CalibratedTable", calibrated)):
        rule_for(Settings(), rows, table)(Problem((), "ms", 0.0))
    free, sampled = (problem.evidence.energy for problem in seen)
    assert free is not None
    assert sampled is not None
    assert [free(key) for key in "abcd"] == [4.0, 16.0, 36.0, 64.0]
    assert [sampled(key) for key in "abcd"] == [4.0, 80.0, 324.0, 5.0 * 64.0]
