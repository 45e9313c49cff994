"""The rank rule a user named, with what it may need beside the candidate table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np

from onnx_lowrank.allocators import ALLOCATORS, SEARCHING, Allocator
from onnx_lowrank.candidates import Candidate, Evidence, Name, Problem
from onnx_lowrank.layer import Shape
from onnx_lowrank.search.calibrated import CalibratedTable
from onnx_lowrank.search.table import Row
from onnx_lowrank.settings import Settings
from onnx_lowrank.spectra import Unfolding

GRID = 1.01  # budgets of searches are powers of it


def rule_for(
    settings: Settings, rows: Sequence[Row], calibrated: CalibratedTable | None, deadline: float = math.inf
) -> Allocator:
    """The rule, bound to its evidence.

    Args:
        settings: Names the rule.
        rows: The candidate table.
        calibrated: What was learnt from samples; None without.
        deadline: `time.monotonic()` at which measuring should end.
    """
    layers = {row.layer.key: row.layer for row in rows}
    energies = {} if calibrated is None else calibrated.energies

    @cache
    def squared(key: str) -> float:
        return float(np.square(layers[key].read(), dtype=np.float64).sum())

    @cache
    def per_weight() -> float:
        """tr(M G M^T) / ||W||^2 of the middle one of the calibrated layers."""
        known = [energies[key] / squared(key) for key in energies if key in layers and squared(key) > 0]
        return float(np.median(known)) if known else 1.0

    @cache
    def energy(key: str) -> float:
        """Of outputs; where no sample reaches the layer as if its inputs were those of the middle one."""
        return energies[key] if key in energies else per_weight() * squared(key)

    @cache
    def unfolding(key: str, first_axes: Shape) -> Unfolding:
        return Unfolding.of(layers[key].read(), first_axes)

    measure = None if calibrated is None else calibrated.measure
    evidence = Evidence(energy, unfolding, measure, settings.evaluations, settings.seed, deadline)
    rule = ALLOCATORS[settings.allocator]
    found: dict[tuple[str, float], list[Name]] = {}

    def bound(problem: Problem) -> tuple[Candidate, ...]:
        """Of size a rule is asked twice, before and after what it chooses is timed: that must be the same choice.

        Where something of it could not be timed and is gone, the rule is asked again.
        """
        if problem.cost == "ms":
            budget = problem.budget if settings.allocator not in SEARCHING else _rounded(problem)
            return rule(replace(problem, budget=budget, evidence=evidence))
        asked = problem.cost, problem.budget
        held = {c.name: c for options in problem.layers for c in options}
        if asked not in found or not held.keys() >= set(found[asked]):
            found[asked] = [c.name for c in rule(replace(problem, evidence=evidence))]
        return tuple(held[name] for name in found[asked])

    return bound


def _rounded(problem: Problem) -> float:
    """A budget of time, less up to one percent, so that a search may be started again with the same one.

    Timed again it comes out otherwise by a few tenths of a percent: a search that was killed would meet next to none of
    the choices that it had measured. A budget that few choices meet stays as it is.
    """
    if problem.budget <= 0:
        return problem.budget
    rounded = GRID ** math.floor(math.log(problem.budget, GRID))
    return rounded if problem.total(problem.cheapest()) <= rounded else problem.budget
