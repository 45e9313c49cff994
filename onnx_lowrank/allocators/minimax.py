"""Minimax: the largest relative spectral error over all layers is as small as possible (ALDS, arXiv 2107.11442).

The global step of ALDS over our candidates: all layers get the same bound on sigma_{r+1} / sigma_1.
"""

from __future__ import annotations

from onnx_lowrank.allocators.equal_error import equal_error
from onnx_lowrank.candidates import Candidate, Problem


def minimax(problem: Problem) -> tuple[Candidate, ...]:
    """Equal relative spectral error over all layers, as small as the budget allows."""
    return equal_error(problem, lambda candidate: candidate.spectral_error)
