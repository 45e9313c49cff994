"""Reinforcement: a policy that walks over the layers and picks a rank for each (after AMC, He et al., ECCV 2018).

The policy is a softmax over the candidates of every layer, at first a bump around the knapsack's choice. An episode
draws one rank per layer, from those that leave enough of the budget for the layers to come at their cheapest. Its
reward is accuracy minus cost,

    R = -log(measured loss) - COST_WEIGHT cost / budget,

and the logits follow the policy gradient of a batch of episodes (REINFORCE; Williams, 1992), the rewards normalised
over the batch. There is no network and no state but the budget left: a hundred measurements would not train more.
"""

from __future__ import annotations

import math
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.allocators.trials import Place, Trials
from onnx_lowrank.candidates import Candidate, Problem

BATCH = 8
RATE = 0.5
COST_WEIGHT = 0.1
# Logits fall by this much per step away from the knapsack's choice.
FOCUS = 1.0
# Episodes per measurement: a policy that has settled repeats itself, and is done.
REPEATS = 3
_SMALLEST = 1e-12
Vector = NDArray[np.float64]


def reinforcement(problem: Problem) -> tuple[Candidate, ...]:
    """The best choice measured.

    Raises:
        InputError: without anything to measure on.
    """
    trials = Trials(problem, "reinforcement")
    rng = np.random.default_rng(problem.evidence.seed)
    costs = [np.array([c.cost(problem.cost) for c in ladder]) for ladder in trials.ladders]
    logits = [-FOCUS * np.abs(np.arange(len(c)) - i) for c, i in zip(costs, trials.start, strict=True)]
    if trials.left:
        trials.loss(trials.start)
    for _ in range(REPEATS * problem.evidence.evaluations // BATCH):
        batch: list[tuple[float, list[Vector]]] = []
        while trials.left and len(batch) < BATCH:
            place, gradients = _episode(logits, costs, problem.budget, rng)
            place = trials.fitted(place)  # it fits, but for rounding
            used = problem.total(trials.chosen(place)) / (problem.budget or 1.0)
            batch.append((-math.log(max(trials.loss(place), _SMALLEST)) - COST_WEIGHT * used, gradients))
        if len(batch) < BATCH:
            break
        rewards = np.array([reward for reward, _ in batch])
        advantages = (rewards - rewards.mean()) / (rewards.std() or 1.0)
        for advantage, (_, gradients) in zip(advantages, batch, strict=True):
            for layer, gradient in enumerate(gradients):
                logits[layer] = logits[layer] + RATE * float(advantage) * gradient
    return trials.best


def _episode(
    logits: list[Vector], costs: list[Vector], budget: float, rng: np.random.Generator
) -> tuple[Place, list[Vector]]:
    """One choice drawn from the policy, and the gradient of its log-probability by every layer's logits."""
    cheapest = [float(cost.min()) for cost in costs]
    reserve = [*accumulate(reversed(cheapest[1:]), initial=0.0)][::-1]
    place: list[int] = []
    gradients: list[Vector] = []
    for layer, cost in enumerate(costs):
        allowed = cost <= max(budget - reserve[layer], cheapest[layer])
        weights = np.where(allowed, np.exp(logits[layer] - logits[layer][allowed].max()), 0.0)
        shares = weights / weights.sum()
        picked = int(rng.choice(len(shares), p=shares))
        place.append(picked)
        budget -= float(cost[picked])
        gradients.append(np.eye(len(shares))[picked] - shares)
    return tuple(place), gradients
