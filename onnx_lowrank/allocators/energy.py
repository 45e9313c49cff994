"""Equal energy: every layer keeps the same share 1 - e of its squared singular values (trained rank pruning, eq. 3)."""

from __future__ import annotations

from onnx_lowrank.allocators.equal_error import equal_error
from onnx_lowrank.candidates import Candidate, Problem


def energy(problem: Problem) -> tuple[Candidate, ...]:
    """Equal relative Frobenius error over all layers, as small as the budget allows."""
    return equal_error(problem, lambda candidate: candidate.error)
