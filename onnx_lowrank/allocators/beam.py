"""Beam search over the layers, on measured loss (survey of Ou et al., arXiv 2303.13635, II-B).

Layers are decided one by one, the costliest first. Every choice in the beam tries for the next layer the rank it has
and the ranks one step below and above; the layers still open share what is left of the budget by the knapsack. All are
measured, and the `WIDTH` best go on. Passes over the layers are repeated while they find anything better.
"""

from __future__ import annotations

from dataclasses import replace

from onnx_lowrank.allocators.knapsack import knapsack
from onnx_lowrank.allocators.trials import Place, Trials
from onnx_lowrank.candidates import Candidate, Problem

WIDTH = 3


def beam(problem: Problem) -> tuple[Candidate, ...]:
    """The best choice measured.

    Raises:
        InputError: without anything to measure on.
    """
    trials = Trials(problem, "beam")
    at, found = trials.start, float("inf")
    while trials.left and (loss := trials.loss(at)) < found:
        found = loss
        at = _one_pass(problem, trials, at)
    return trials.best


def _one_pass(problem: Problem, trials: Trials, start: Place) -> Place:
    span = [ladder[-1].cost(problem.cost) - ladder[0].cost(problem.cost) for ladder in trials.ladders]
    order = sorted(range(len(span)), key=lambda layer: (-span[layer], layer))
    states = [start]
    for number, layer in enumerate(order):
        decided, reached = order[: number + 1], dict.fromkeys(states)
        for state in states:
            for at in (state[layer] - 1, state[layer] + 1):
                if 0 <= at < len(trials.ladders[layer]):
                    reached[_completed(problem, trials, (*state[:layer], at, *state[layer + 1 :]), decided)] = None
        measured: list[tuple[float, Place]] = []
        for place in reached:
            if not trials.fits(place):
                continue
            if not trials.left:
                return states[0]
            measured.append((trials.loss(place), place))
        states = [place for _, place in sorted(measured)[:WIDTH]]
    return states[0]


def _completed(problem: Problem, trials: Trials, place: Place, decided: list[int]) -> Place:
    """The choice with its open layers allocated anew by the knapsack."""
    options = tuple(
        (ladder[place[layer]],) if layer in decided else tuple(ladder) for layer, ladder in enumerate(trials.ladders)
    )
    return trials.place(knapsack(replace(problem, layers=options)))
