"""Lagrangian: normalised output distortion + lambda cost, one lambda for all layers (BALF, arXiv 2509.25136).

    min sum_l ||Y_l - Y'_l||^2 / ||Y_l||^2 + lambda cost_l

The distortion is that of the layer's outputs where samples were given, that of its weight without.
"""

from __future__ import annotations

from onnx_lowrank.allocators.relaxation import relaxed
from onnx_lowrank.candidates import Candidate, Problem


def lagrangian(problem: Problem) -> tuple[Candidate, ...]:
    """Least sum of squared relative errors, the budget relaxed."""
    return relaxed(problem, lambda candidate: candidate.error**2)
