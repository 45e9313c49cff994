"""Multiple-choice knapsack: one candidate per layer, least predicted loss within the budget, solved exactly.

    min sum_l sum_c x_lc loss_lc   s.t.   sum_c x_lc = 1 for all l,   sum_lc x_lc cost_lc <= budget,   x binary,

by HiGHS through scipy.optimize.milp. Candidates that another of the same layer beats on both axes are dropped before,
and so are those that alone lose more than a choice that is known: HiGHS is content with 1e-6 of the unit that losses
are measured in, so that the unit must be no larger than the loss of the whole choice.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Generator, Sequence
from pathlib import Path

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from onnx_lowrank.allocators.relaxation import relaxed
from onnx_lowrank.candidates import Candidate, Cost, Problem, loss_of

# Hundreds of layers of one shape are nearly interchangeable: the best choice is found in seconds, its proof never is.
TIME_LIMIT_S = 10.0
GAP = 1e-6
# HiGHS may exceed a budget by this share: then it is asked again, with so much less.
INFEASIBILITY = 1e-6


def knapsack(problem: Problem) -> tuple[Candidate, ...]:
    """Least sum of losses with sum of costs at most the budget; the cheapest choice where no choice fits."""
    best = relaxed(problem, lambda candidate: candidate.loss)
    if not problem.fits(best):
        return problem.cheapest()
    while (limit := loss_of(best)) > 0:
        found = _solved(problem, limit, 1.0)
        if found and not problem.fits(found):
            found = _solved(problem, limit, 1.0 - INFEASIBILITY)
        if found and problem.fits(found):
            best = min(best, found, key=loss_of)
        if loss_of(best) > limit / 2:
            break
    return best


def _solved(problem: Problem, limit: float, share: float) -> tuple[Candidate, ...]:
    """The choice of least loss within a share of the budget, known to be `limit` at most; empty if none was found."""
    options = [[c for c in undominated(group, problem.cost) if c.loss <= limit] for group in problem.layers]
    flat = [candidate for group in options for candidate in group]
    losses = np.array([c.loss for c in flat])
    costs = np.array([c.cost(problem.cost) for c in flat])
    owner = np.repeat(np.arange(len(options)), [len(group) for group in options])
    one_each = sparse.csr_array((np.ones(len(flat)), (owner, np.arange(len(flat)))), shape=(len(options), len(flat)))
    unit = problem.budget or 1.0  # scaled to order one: HiGHS works with absolute tolerances
    with _quiet():
        result = milp(
            losses / limit,
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(sparse.csr_array(costs[None, :] / unit), -np.inf, share * problem.budget / unit),
            ],
            integrality=np.ones(len(flat), dtype=np.int64),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": GAP, "time_limit": TIME_LIMIT_S},
        )
    if result.x is None:  # at the time limit, or where only the whole budget is enough
        return ()
    picked = {int(owner[i]): flat[i] for i in np.flatnonzero(result.x > 0.5)}
    return tuple(picked[layer] for layer in range(len(options)))


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Keep standard output clean: HiGHS prints a line to it now and then, whatever it is told."""
    sys.stdout.flush()
    kept = os.dup(1)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def undominated(options: Sequence[Candidate], cost: Cost) -> list[Candidate]:
    """Candidates of one layer that no other beats on both cost and loss, cheapest first."""
    best: list[Candidate] = []
    for option in sorted(options, key=lambda c: (c.cost(cost), c.loss)):
        if not best or option.loss < best[-1].loss:
            best.append(option)
    return best
