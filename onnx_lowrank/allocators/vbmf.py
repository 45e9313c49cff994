"""VBMF: ranks of the analytic variational Bayesian solution, weakened to meet the budget (Kim et al., ICLR 2016).

The noise model finds a rank R_evb in every unfolding that a chain narrows (spectra; Nakajima et al. 2013). It knows of
no budget. With one factor w for all layers the rank asked for is (Gusak et al., MUSCO, arXiv 1903.09973)

    R(w) = R_full - w (R_full - R_evb),    0 <= w <= 1,    and beyond it    R(w) = (2 - w) R_evb,    1 < w <= 2,

and every layer takes its cheapest candidate with at least these ranks; w is as small as the budget allows. Layers that
save next to nothing are left as they are (`equal_error.of_weight`): the authors' layers are convolutions, and a
classifier of few classes may have an EVB rank of none. Chains of blocks (`interfaces.of_blocks`) come after all others,
from w = 2 on.
"""

from __future__ import annotations

from onnx_lowrank.allocators.equal_error import equal_error, of_weight
from onnx_lowrank.allocators.interfaces import interfaces, of_blocks
from onnx_lowrank.candidates import Candidate, Problem
from onnx_lowrank.errors import InputError
from onnx_lowrank.spectra import Unfolding

_BEYOND = 2.0  # the largest w


def vbmf(problem: Problem) -> tuple[Candidate, ...]:
    """Equal weakening of the EVB ranks of all layers.

    Raises:
        InputError: if the weights' spectra are not at hand.
    """
    unfolding = problem.evidence.unfolding
    if unfolding is None:
        raise InputError("the rule vbmf without spectra", "spectra of the layers' weights", "use another rule")

    def weakening(candidate: Candidate) -> float:
        chain = candidate.chain
        if chain is None:
            return 0.0
        found = (_weakened(p.channels, unfolding(candidate.key, p.carried)) for p in interfaces(chain))
        return _BEYOND * of_blocks(chain) + max(found, default=0.0)

    return of_weight(problem, lambda part: equal_error(part, weakening))


def _weakened(channels: int, found: Unfolding) -> float:
    """The least w at which R(w) is no more than `channels`."""
    full, evb = found.full_rank, found.evb_rank
    if channels >= full:
        return 0.0
    if channels >= evb:
        return (full - channels) / (full - evb)
    return 2.0 - channels / evb
