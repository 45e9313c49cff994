"""What rules of one share for all have in common: every layer may lose as much, in one measure or another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from onnx_lowrank.candidates import Candidate, Cost, Problem

# Of the budget. A classifier of ten classes is a ten-thousandth of its network's multiply-accumulates: cut to the share
# of its rank that all layers are cut to, it costs most of the accuracy and saves what nobody measures.
NEXT_TO_NOTHING = 1e-3


def spectral_error(candidate: Candidate) -> float:
    """The relative spectral norm of what a candidate cuts.

    Raises:
        ValueError: if it was not measured.
    """
    if candidate.spectral_error is None:
        raise ValueError(f"{candidate.key}: the spectral error of {candidate.method} {candidate.rank} was not measured")
    return candidate.spectral_error


def equal_error(problem: Problem, error: Callable[[Candidate], float]) -> tuple[Candidate, ...]:
    """The smallest common error bound whose cheapest choice fits the budget, found among the candidates' own errors.

    For a bound e every layer takes its cheapest candidate with error <= e; the cost falls as e grows, so that a binary
    search over the sorted errors is exact. Where even the largest bound does not fit, the cheapest choice is returned.
    """
    bounds = sorted({error(candidate) for options in problem.layers for candidate in options})
    low, high = 0, len(bounds) - 1
    while low < high:
        middle = (low + high) // 2
        if problem.total(_within(problem, error, bounds[middle])) <= problem.budget:
            high = middle
        else:
            low = middle + 1
    return _within(problem, error, bounds[low]) if bounds else ()


def of_weight(problem: Problem, rule: Callable[[Problem], tuple[Candidate, ...]]) -> tuple[Candidate, ...]:
    """The choice of a rule that looks at ranks alone; layers that save less than `NEXT_TO_NOTHING` are left alone.

    All layers take part where the budget cannot be met without them.
    """
    least = NEXT_TO_NOTHING * problem.budget
    part = replace(problem, layers=tuple(_worth(options, problem.cost, least) for options in problem.layers))
    return rule(part if part.fits(part.cheapest()) else problem)


def _worth(options: tuple[Candidate, ...], cost: Cost, least: float) -> tuple[Candidate, ...]:
    saved = options[0].cost(cost) - min(option.cost(cost) for option in options)
    return options if saved >= least else options[:1]


def _within(problem: Problem, error: Callable[[Candidate], float], bound: float) -> tuple[Candidate, ...]:
    return tuple(
        min((c for c in options if error(c) <= bound), key=lambda c: (c.cost(problem.cost), error(c)))
        for options in problem.layers
    )
