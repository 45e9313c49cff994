"""What the rules by Optuna share: a study over one position per layer, asked and told."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Generator, Iterator
from importlib import import_module
from typing import TYPE_CHECKING

import numpy as np

from onnx_lowrank.allocators.trials import Place, Trials
from onnx_lowrank.candidates import Candidate, Problem
from onnx_lowrank.errors import InputError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler

# Proposals per measurement: once a search repeats itself that often it is over.
REPEATS = 3
# Choices a study begins with, the first generation of NSGA-II: with a hundred measurements there are five.
POPULATION = 20
# How a neighbour of the start differs from it.
MOVES = (-2, -1, 1, 2)
MOST_MOVED = 3
Objectives = Callable[[float, float], tuple[float, ...]]


def require_optuna(rule: str) -> None:
    """Refuse early.

    Raises:
        InputError: if Optuna is not installed.
    """
    try:
        import_module("optuna")
    except ImportError as error:
        got = f"the rule {rule}, while Optuna is not installed"
        raise InputError(got, "Optuna to search with", "pip install onnx-lowrank[search]") from error


def studied(
    problem: Problem, rule: str, sampler: Callable[[int], BaseSampler], objectives: Objectives
) -> tuple[Candidate, ...]:
    """The best choice that a study measures.

    It begins with neighbours of the knapsack's choice and stays within reach of it. What is proposed is made to fit
    before it is measured (`Trials.fitted`), and the study is told what was measured.

    Args:
        problem: The problem.
        rule: Name of the rule.
        sampler: Makes the sampler from a seed.
        objectives: (measured loss, share of the budget used) -> what the study minimises.

    Raises:
        InputError: if Optuna is not installed, or there is nothing to measure on.
    """
    require_optuna(rule)
    import optuna  # noqa: PLC0415 - optional

    trials = Trials(problem, rule)
    if not trials.left:
        return trials.best
    least = [optuna.study.StudyDirection.MINIMIZE] * len(objectives(0.0, 0.0))
    with _quiet(logging.getLogger("optuna")):
        study = optuna.create_study(sampler=sampler(problem.evidence.seed), directions=least)
    space: dict[str, BaseDistribution] = {
        f"layer{number}": optuna.distributions.IntDistribution(reach[0], reach[-1])
        for number, reach in enumerate(trials.reach)
    }
    first = iter(_first(trials, problem.evidence.seed))
    for _ in range(REPEATS * problem.evidence.evaluations):
        if not trials.left:
            break
        asked = study.ask(space)
        place = next(first, None) or trials.fitted(tuple(int(asked.params[name]) for name in space))
        used = problem.total(trials.chosen(place)) / (problem.budget or 1.0)
        # What was measured is told, not what was proposed, in a trial with what the sampler noted on the other.
        noted = study.tell(asked, state=optuna.trial.TrialState.FAIL).system_attrs
        params, values = dict(zip(space, place, strict=True)), objectives(trials.loss(place), used)
        study.add_trial(
            optuna.trial.create_trial(params=params, distributions=space, values=values, system_attrs=noted)
        )
    return trials.best


def _first(trials: Trials, seed: int) -> Iterator[Place]:
    """The start and neighbours of it, a step or two away in a few layers."""
    yield trials.start
    rng = np.random.default_rng(seed)
    for _ in range(POPULATION - 1):
        at = list(trials.start)
        for layer in rng.choice(len(at), min(len(at), int(rng.integers(1, MOST_MOVED + 1))), replace=False):
            reach = trials.reach[layer]
            at[layer] = min(max(at[layer] + int(rng.choice(MOVES)), reach[0]), reach[-1])
        yield trials.fitted(tuple(at))


@contextlib.contextmanager
def _quiet(log: logging.Logger) -> Generator[None]:
    """Without news of a study that nobody asked for by name; the caller's level is given back."""
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)
