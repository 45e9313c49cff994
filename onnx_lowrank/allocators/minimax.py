"""Minimax: the largest relative spectral error over all layers is as small as possible (ALDS, arXiv 2107.11442).

    min max_l error_l(method, rank)    s.t.    sum_l cost_l <= budget

over all formats and ranks at once. For a given bound the layers do not depend on each other, so that binary search over
the candidates' own errors is exact; `alds` is the alternation the paper solves the same problem by.
"""

from __future__ import annotations

from onnx_lowrank.allocators.equal_error import equal_error, spectral_error
from onnx_lowrank.candidates import Candidate, Problem


def minimax(problem: Problem) -> tuple[Candidate, ...]:
    """Equal relative spectral error over all layers, as small as the budget allows."""
    return equal_error(problem, spectral_error)
