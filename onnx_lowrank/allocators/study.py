"""What the rules by Optuna share: a study over one position per layer, asked and told."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Generator
from importlib import import_module
from typing import TYPE_CHECKING

from onnx_lowrank.allocators.trials import Trials
from onnx_lowrank.candidates import Candidate, Problem
from onnx_lowrank.errors import InputError

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

# Proposals per measurement: once a search repeats itself that often it is over.
REPEATS = 3
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

    What is proposed beyond the budget is made to fit before it is measured (`Trials.fitted`).

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
    least = [optuna.study.StudyDirection.MINIMIZE] * len(objectives(0.0, 0.0))
    with _quiet(logging.getLogger("optuna")):
        study = optuna.create_study(sampler=sampler(problem.evidence.seed), directions=least)
    names = [f"layer{number}" for number in range(len(trials.ladders))]
    space = {
        name: optuna.distributions.IntDistribution(0, len(ladder) - 1)
        for name, ladder in zip(names, trials.ladders, strict=True)
    }
    study.enqueue_trial(dict(zip(names, trials.start, strict=True)))
    for _ in range(REPEATS * problem.evidence.evaluations):
        if not trials.left:
            break
        asked = study.ask(dict(space))
        place = trials.fitted(tuple(int(asked.params[name]) for name in names))
        used = problem.total(trials.chosen(place)) / (problem.budget or 1.0)
        study.tell(asked, list(objectives(trials.loss(place), used)))
    return trials.best


@contextlib.contextmanager
def _quiet(log: logging.Logger) -> Generator[None]:
    """Without news of a study that nobody asked for by name; the caller's level is given back."""
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)
