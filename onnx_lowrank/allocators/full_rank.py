"""Full rank: every layer is rewritten at the rank that reproduces it. Slower than the original; a check, not a goal."""

from __future__ import annotations

from onnx_lowrank.candidates import Candidate, Problem


def full_rank(problem: Problem) -> tuple[Candidate, ...]:
    """The exact candidates, taking the methods in turn from layer to layer; the budget is ignored."""
    chosen: list[Candidate] = []
    for number, options in enumerate(problem.layers):
        exact = [candidate for candidate in options if candidate.exact]
        chosen.append(exact[number % len(exact)] if exact else options[0])
    return tuple(chosen)
