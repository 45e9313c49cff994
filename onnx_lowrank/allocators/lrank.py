"""L-rank: cost of the rank and energy of the tail, weighed by one lambda (Idelbayev and Carreira-Perpinan, CVPR 2020).

    min_r lambda cost_l(r) + sum_{i > r} sigma_{l,i}^2

for every layer on its own; lambda is the smallest that meets the budget. Unlike in `lagrangian` the tails are not
normalised: a layer of small weights is cut first. For formats other than the SVD the tail is the squared error.
"""

from __future__ import annotations

from onnx_lowrank.allocators.relaxation import relaxed
from onnx_lowrank.candidates import Candidate, Problem
from onnx_lowrank.errors import InputError


def lrank(problem: Problem) -> tuple[Candidate, ...]:
    """Least sum of squared errors, the budget relaxed.

    Raises:
        InputError: if the layers' energies are not at hand.
    """
    energy = problem.evidence.energy
    if energy is None:
        raise InputError("the rule lrank without energies", "the energy of every layer's weight", "use another rule")
    return relaxed(problem, lambda candidate: candidate.error**2 * energy(candidate.key))
