"""Evolution: NSGA-II over rank vectors, minimising measured loss and cost (Deb et al., IEEE TEC 6, 2002).

By Optuna's sampler: pymoo has the same algorithm, and brings matplotlib and seventeen other packages along.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx_lowrank.allocators.study import POPULATION, studied
from onnx_lowrank.candidates import Candidate, Problem

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler


def evolution(problem: Problem) -> tuple[Candidate, ...]:
    """The best choice measured.

    Raises:
        InputError: if Optuna is not installed, or there is nothing to measure on.
    """
    return studied(problem, "evolution", _sampler, lambda loss, used: (loss, used))


def _sampler(seed: int) -> BaseSampler:
    from optuna.samplers import NSGAIISampler  # noqa: PLC0415 - optional

    return NSGAIISampler(population_size=POPULATION, seed=seed)
