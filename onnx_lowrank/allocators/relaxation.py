"""What lagrangian and lrank share: the Lagrangian relaxation of the budget.

Every layer takes argmin over its candidates of D + lambda cost; lambda is the smallest that meets the budget. A layer's
choice moves along the lower convex hull of its (cost, D) as lambda grows, so that the slopes of all hulls are the only
values of lambda at which anything changes: bisection over them is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from onnx_lowrank.candidates import Candidate, Cost, Problem

Distortion = Callable[[Candidate], float]
Hull = Sequence[tuple[float, Candidate]]


def relaxed(problem: Problem, distortion: Distortion) -> tuple[Candidate, ...]:
    """The least distortion at the smallest price of cost that meets the budget; the cheapest choice where none does."""
    hulls = [_hull(options, problem.cost, distortion) for options in problem.layers]
    prices = sorted({price for hull in hulls for price, _ in hull})
    low, high = 0, len(prices) - 1
    while low < high:
        middle = (low + high) // 2
        if problem.fits(_at(hulls, prices[middle])):
            high = middle
        else:
            low = middle + 1
    return _at(hulls, prices[low]) if prices else ()


def _at(hulls: Sequence[Hull], price: float) -> tuple[Candidate, ...]:
    return tuple(next(option for start, option in reversed(hull) if start <= price) for hull in hulls)


def _hull(options: Sequence[Candidate], cost: Cost, distortion: Distortion) -> Hull:
    """Vertices of the lower convex hull, dearest first, each with the lambda from which on it is chosen."""
    at = min(options, key=lambda c: (distortion(c), c.cost(cost)))
    hull = [(0.0, at)]
    while cheaper := [c for c in options if c.cost(cost) < at.cost(cost)]:
        price, _, at = min(
            (((distortion(c) - distortion(at)) / (at.cost(cost) - c.cost(cost)), c.cost(cost), c) for c in cheaper),
            key=lambda edge: edge[:2],
        )
        hull.append((max(price, hull[-1][0]), at))  # rounding must not turn the hull back
    return hull
