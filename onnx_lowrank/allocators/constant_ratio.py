"""Constant ratio: ranks proportional to the full ranks of their layer (survey of Ou et al., arXiv 2303.13635, II-B).

Of the candidates whose ranks are all at least the share rho of the full rank, that of the unfolding each rank cuts,
every layer takes the cheapest; rho is as large as the budget allows. Layers that save next to nothing are left as they
are (`equal_error.of_weight`): the rule is one for convolutions, and a share of the ranks of ten classes is classes
lost. Chains of blocks (`interfaces.of_blocks`) come after all others, among themselves by the same share.
"""

from __future__ import annotations

import math

from onnx_lowrank.allocators.equal_error import equal_error, of_weight
from onnx_lowrank.allocators.interfaces import narrowest, of_blocks
from onnx_lowrank.candidates import Candidate, Problem


def constant_ratio(problem: Problem) -> tuple[Candidate, ...]:
    """Equal share of the full rank between the stages of every layer."""
    return of_weight(problem, lambda part: equal_error(part, _lack))


def _lack(candidate: Candidate) -> float:
    """-rho, or 1 / rho for a chain of blocks: both fall with rho, and all of the first are below all of the others."""
    if candidate.chain is None:
        return -math.inf
    share = narrowest(candidate.chain)
    return 1 / share if of_blocks(candidate.chain) else -share
