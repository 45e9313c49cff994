"""What the search rules share: choices measured on the network, within a budget of measurements.

A choice is a tuple of positions, one per layer, among the candidates of the layer that no other beats on cost and
predicted loss, cheapest first. The first choice measured is the knapsack's, so that no search ends with a choice that
measures worse than the default; what predictions get wrong is mended near it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from onnx_lowrank.allocators.knapsack import knapsack, undominated
from onnx_lowrank.candidates import Candidate, Problem
from onnx_lowrank.errors import InputError

Place = tuple[int, ...]
# What counts as the loss of a choice that has none.
RUINED = 1e30
# Steps from the start that a search looks at: a hundred measurements tell nothing about whole ladders of dozens.
WINDOW = 4


class Trials:
    """Measured choices of one problem.

    Args:
        problem: The problem.
        rule: Name of the rule, for its refusal.

    Attributes:
        ladders: Candidates per layer, cheapest first.
        start: The knapsack's choice; the cheapest where nothing fits.
        reach: Positions per layer within `WINDOW` steps of the start.

    Raises:
        InputError: if nothing can be measured.
    """

    def __init__(self, problem: Problem, rule: str) -> None:
        if problem.evidence.measure is None:
            got = f"the rule {rule} without samples to measure its choices on"
            raise InputError(got, "--calibration with enough samples", "give more samples, or use another rule")
        self._problem, self._measure = problem, problem.evidence.measure
        self._left = problem.evidence.evaluations
        self.ladders = tuple(undominated(options, problem.cost) for options in problem.layers)
        self.start = self.place(knapsack(problem))
        self.reach = tuple(
            range(max(0, at - WINDOW), min(len(ladder), at + WINDOW + 1))
            for ladder, at in zip(self.ladders, self.start, strict=True)
        )
        self._losses: dict[Place, float] = {}
        self._best = self.start

    @property
    def left(self) -> bool:
        """Whether anything more may be measured and there is anything to choose."""
        late = time.monotonic() > self._problem.evidence.deadline
        return self._left > 0 and not late and self.fits(self.start) and max(map(len, self.ladders), default=0) > 1

    @property
    def best(self) -> tuple[Candidate, ...]:
        """The choice of least measured loss so far."""
        return self.chosen(self._best)

    def loss(self, place: Place) -> float:
        """Measured loss of a choice that fits; what was measured before costs nothing."""
        if place not in self._losses:
            self._left -= 1
            loss = self._measure(self.chosen(place))
            self._losses[place] = loss if math.isfinite(loss) else RUINED
            if self._losses[place] < self._losses.get(self._best, float("inf")):
                self._best = place
        return self._losses[place]

    def chosen(self, place: Place) -> tuple[Candidate, ...]:
        """The candidates at `place`."""
        return tuple(ladder[i] for ladder, i in zip(self.ladders, place, strict=True))

    def place(self, chosen: tuple[Candidate, ...]) -> Place:
        """Where a choice stands; in place of one that is beaten, the best that costs no more."""
        cost = self._problem.cost
        return tuple(
            max(i for i, option in enumerate(ladder) if option.cost(cost) <= one.cost(cost))
            for ladder, one in zip(self.ladders, chosen, strict=True)
        )

    def fits(self, place: Place) -> bool:
        """Whether a choice stays within the budget."""
        return self._problem.fits(self.chosen(place))

    def fitted(self, place: Place) -> Place:
        """The choice within reach, made cheaper step by step until it fits, then dearer as long as it does.

        Steps are those of least predicted loss per cost saved, or most per cost spent. What a choice moves off the
        start is what is asked about: layers above it are cheapened last, layers below it are not made dearer. So
        searches may propose anything, nothing is measured in vain, and what some layers give others get.
        """
        at = list(place)
        while not self.fits(tuple(at)):
            down = [(i > self.start[n], self._price(n, i), n) for n, i in enumerate(at) if i > self.reach[n][0]]
            if not down:
                return tuple(at)
            at[min(down)[-1]] -= 1
        while up := [(self._price(n, i + 1), n) for n, i in enumerate(at) if self._affordable(at, n, i + 1)]:
            at[max(up)[-1]] += 1
        return tuple(at)

    def _affordable(self, at: Sequence[int], layer: int, to: int) -> bool:
        """Whether a layer may move there from `at`."""
        above = self.start[layer] < to <= self.reach[layer][-1]
        return above and self.fits((*at[:layer], to, *at[layer + 1 :]))

    def _price(self, layer: int, at: int) -> float:
        """Predicted loss per cost saved by the step down from there."""
        here, there, cost = self.ladders[layer][at], self.ladders[layer][at - 1], self._problem.cost
        return (there.loss - here.loss) / (here.cost(cost) - there.cost(cost))
