"""Rank rules, one per file: from a candidate table and a budget to one choice per layer."""

from __future__ import annotations

from collections.abc import Callable

from onnx_lowrank.allocators.alds import alds, alds_authors
from onnx_lowrank.allocators.beam import beam
from onnx_lowrank.allocators.constant_ratio import constant_ratio
from onnx_lowrank.allocators.energy import energy
from onnx_lowrank.allocators.evolution import evolution
from onnx_lowrank.allocators.full_rank import full_rank
from onnx_lowrank.allocators.knapsack import knapsack
from onnx_lowrank.allocators.lagrangian import lagrangian
from onnx_lowrank.allocators.lrank import lrank
from onnx_lowrank.allocators.minimax import minimax
from onnx_lowrank.allocators.pca_energy import pca_energy
from onnx_lowrank.allocators.reinforcement import reinforcement
from onnx_lowrank.allocators.study import require_optuna
from onnx_lowrank.allocators.tpe import tpe
from onnx_lowrank.allocators.vbmf import vbmf
from onnx_lowrank.candidates import Candidate, Problem

Allocator = Callable[[Problem], tuple[Candidate, ...]]
ALLOCATORS: dict[str, Allocator] = {
    "knapsack": knapsack,
    "energy": energy,
    "minimax": minimax,
    "alds": alds,
    "alds_authors": alds_authors,
    "lagrangian": lagrangian,
    "lrank": lrank,
    "pca_energy": pca_energy,
    "constant_ratio": constant_ratio,
    "vbmf": vbmf,
    "beam": beam,
    "evolution": evolution,
    "tpe": tpe,
    "reinforcement": reinforcement,
    "full_rank": full_rank,
}
# Rules that measure the network under their choices.
SEARCHING = frozenset({"beam", "evolution", "tpe", "reinforcement"})
# Rules that compare spectral norms.
SPECTRAL = frozenset({"minimax", "alds", "alds_authors"})
# Rules that choose a number of slices, too.
SLICING = frozenset({"alds", "alds_authors"})
BY_OPTUNA = frozenset({"evolution", "tpe"})

__all__ = ["ALLOCATORS", "BY_OPTUNA", "SEARCHING", "SLICING", "SPECTRAL", "Allocator", "require_optuna"]
