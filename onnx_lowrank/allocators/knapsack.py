"""Multiple-choice knapsack: one candidate per layer, least predicted loss within the budget, solved exactly.

    min sum_l sum_c x_lc loss_lc   s.t.   sum_c x_lc = 1 for all l,   sum_lc x_lc cost_lc <= budget,   x binary,

by HiGHS through scipy.optimize.milp. Candidates that another of the same layer beats on both axes are dropped before.
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

from onnx_lowrank.candidates import Candidate, Cost, Problem

# Hundreds of layers of one shape are nearly interchangeable: the best choice is found in seconds, its proof never is.
TIME_LIMIT_S = 10.0
GAP = 1e-6


def knapsack(problem: Problem) -> tuple[Candidate, ...]:
    """Least sum of losses with sum of costs at most the budget; the cheapest choice where no choice fits."""
    options = [undominated(candidates, problem.cost) for candidates in problem.layers]
    flat = [candidate for group in options for candidate in group]
    if not flat or problem.total(problem.cheapest()) > problem.budget:
        return problem.cheapest()
    losses = np.array([c.loss for c in flat])
    costs = np.array([c.cost(problem.cost) for c in flat])
    owner = np.repeat(np.arange(len(options)), [len(group) for group in options])
    one_each = sparse.csr_array((np.ones(len(flat)), (owner, np.arange(len(flat)))), shape=(len(options), len(flat)))
    unit = problem.budget or 1.0  # scaled to order one: HiGHS works with absolute tolerances
    with _quiet():
        result = milp(
            losses / (losses.max() or 1.0),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(sparse.csr_array(costs[None, :] / unit), -np.inf, problem.budget / unit),
            ],
            integrality=np.ones(len(flat), dtype=np.int64),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": GAP, "time_limit": TIME_LIMIT_S},
        )
    if result.x is None:  # only the time limit can end here: a choice that fits exists
        return problem.cheapest()
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
