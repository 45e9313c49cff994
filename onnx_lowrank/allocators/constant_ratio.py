"""Constant ratio: ranks proportional to the channels of their layer (survey of Ou et al., arXiv 2303.13635, II-B).

Of the candidates whose ranks are all at least the share rho of min(in, out), every layer takes the cheapest; rho is as
large as the budget allows.
"""

from __future__ import annotations

import math

from onnx_lowrank.allocators.equal_error import equal_error
from onnx_lowrank.allocators.interfaces import interfaces
from onnx_lowrank.candidates import Candidate, Problem


def constant_ratio(problem: Problem) -> tuple[Candidate, ...]:
    """Equal share of the channels between the stages of every layer."""
    return equal_error(problem, lambda candidate: -_share(candidate))


def _share(candidate: Candidate) -> float:
    if candidate.chain is None:
        return math.inf
    first, last = candidate.chain.stages[0], candidate.chain.stages[-1]
    side = min(first.groups * first.in_, last.groups * last.out) / last.groups
    return min((place.channels / side for place in interfaces(candidate.chain)), default=math.inf)
