"""TPE: tree-structured Parzen estimators over rank vectors, on measured loss (Bergstra et al., NeurIPS 2011)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx_lowrank.allocators.study import studied
from onnx_lowrank.candidates import Candidate, Problem

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler


def tpe(problem: Problem) -> tuple[Candidate, ...]:
    """The best choice measured.

    Raises:
        InputError: if Optuna is not installed, or there is nothing to measure on.
    """
    return studied(problem, "tpe", _sampler, lambda loss, _: (loss,))


def _sampler(seed: int) -> BaseSampler:
    from optuna.samplers import TPESampler  # noqa: PLC0415 - optional

    return TPESampler(seed=seed)
