"""Reinforcement: a policy that picks a rank for every layer (after AMC, He et al., ECCV 2018).

The policy is a softmax over the candidates of every layer near the knapsack's choice, at first a bump around it. An
episode draws one rank per layer, and the choice is made to fit. Its reward is accuracy minus cost,

    R = -log(measured loss) - COST_WEIGHT cost / budget,

and the logits follow the policy gradient of a batch of episodes (REINFORCE; Williams, 1992), the rewards normalised
over the batch; credited is what was measured, not what was drawn. There is no network and no state: a hundred
measurements would not train more.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import softmax

from onnx_lowrank.allocators.trials import Place, Trials
from onnx_lowrank.candidates import Candidate, Problem

BATCH = 8
RATE = 0.5
COST_WEIGHT = 0.1
# Logits fall by this much per step away from the knapsack's choice.
FOCUS = 2.0
# Episodes per measurement: a policy that has settled repeats itself, and is done.
REPEATS = 3
_SMALLEST = 1e-12


def reinforcement(problem: Problem) -> tuple[Candidate, ...]:
    """The best choice measured.

    Raises:
        InputError: without anything to measure on.
    """
    trials = Trials(problem, "reinforcement")
    rng = np.random.default_rng(problem.evidence.seed)
    logits = [-FOCUS * np.abs(np.array(reach) - at) for reach, at in zip(trials.reach, trials.start, strict=True)]
    if trials.left:
        trials.loss(trials.start)
    for _ in range(REPEATS * problem.evidence.evaluations // BATCH):
        policy = [softmax(row) for row in logits]
        batch: list[tuple[float, Place]] = []
        while trials.left and len(batch) < BATCH:
            drawn = (int(rng.choice(reach, p=shares)) for reach, shares in zip(trials.reach, policy, strict=True))
            place = trials.fitted(tuple(drawn))
            used = problem.total(trials.chosen(place)) / (problem.budget or 1.0)
            batch.append((-math.log(max(trials.loss(place), _SMALLEST)) - COST_WEIGHT * used, place))
        if len(batch) < BATCH:
            break
        rewards = np.array([reward for reward, _ in batch])
        advantages = (rewards - rewards.mean()) / (rewards.std() or 1.0)
        for advantage, (_, place) in zip(advantages, batch, strict=True):
            for layer, (reach, shares) in enumerate(zip(trials.reach, policy, strict=True)):
                gradient = (np.array(reach) == place[layer]) - shares
                logits[layer] = logits[layer] + RATE * float(advantage) * gradient
    return trials.best
