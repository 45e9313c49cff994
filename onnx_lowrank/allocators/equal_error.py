"""What energy and minimax share: every layer may lose the same share of its weight, in one norm or another."""

from __future__ import annotations

from collections.abc import Callable

from onnx_lowrank.candidates import Candidate, Problem


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


def _within(problem: Problem, error: Callable[[Candidate], float], bound: float) -> tuple[Candidate, ...]:
    return tuple(
        min((c for c in options if error(c) <= bound), key=lambda c: (c.cost(problem.cost), error(c)))
        for options in problem.layers
    )
