"""PCA energy: greedy on the product of the energies that the layers keep (Zhang et al., TPAMI 2016, section 3.3).

    max prod_l E_l    s.t.    sum_l cost_l <= budget,    E_l = sum_{a <= r_l} lambda_{l,a} / sum_a lambda_{l,a}

with the eigenvalues lambda of a layer's outputs. From everything kept, the step to the next smaller rank that loses the
least share of its energy per cost saved is taken, until the budget is met. E is 1 - error^2 of a candidate, whatever
its format: with samples the energy of the outputs, the paper's; without, that of the weight.
"""

from __future__ import annotations

import heapq
import math

from onnx_lowrank.candidates import SMALLEST_SHARE, Candidate, Cost, Problem


def pca_energy(problem: Problem) -> tuple[Candidate, ...]:
    """The greedy choice; the cheapest where no choice fits."""
    ladders = [_ladder(options, problem.cost) for options in problem.layers]
    at = [0] * len(ladders)
    steps = [(_price(ladder, 0, problem.cost), layer) for layer, ladder in enumerate(ladders) if len(ladder) > 1]
    heapq.heapify(steps)
    while steps and not problem.fits([ladder[i] for ladder, i in zip(ladders, at, strict=True)]):
        _, layer = heapq.heappop(steps)
        at[layer] += 1
        if at[layer] + 1 < len(ladders[layer]):
            heapq.heappush(steps, (_price(ladders[layer], at[layer], problem.cost), layer))
    return tuple(ladder[i] for ladder, i in zip(ladders, at, strict=True))


def _ladder(options: tuple[Candidate, ...], cost: Cost) -> list[Candidate]:
    """What no other candidate beats on cost and energy, dearest first."""
    ladder: list[Candidate] = []
    for option in sorted(options, key=lambda c: (c.cost(cost), c.error)):
        if not ladder or option.error < ladder[-1].error:
            ladder.append(option)
    return ladder[::-1]


def _price(ladder: list[Candidate], at: int, cost: Cost) -> float:
    """Share of its energy that a layer loses by the next step, per cost saved, as a logarithm."""
    here, there = ladder[at], ladder[at + 1]
    return (_log_energy(here) - _log_energy(there)) / (here.cost(cost) - there.cost(cost))


def _log_energy(candidate: Candidate) -> float:
    return math.log(max(1.0 - candidate.error**2, SMALLEST_SHARE))
