"""Rank rules, one per file: from a candidate table and a budget to one choice per layer."""

from __future__ import annotations

from collections.abc import Callable

from onnx_lowrank.allocators.energy import energy
from onnx_lowrank.allocators.full_rank import full_rank
from onnx_lowrank.allocators.knapsack import knapsack
from onnx_lowrank.allocators.minimax import minimax
from onnx_lowrank.candidates import Candidate, Problem

Allocator = Callable[[Problem], tuple[Candidate, ...]]
ALLOCATORS: dict[str, Allocator] = {
    "knapsack": knapsack,
    "energy": energy,
    "minimax": minimax,
    "full_rank": full_rank,
}

__all__ = ["ALLOCATORS", "Allocator", "energy", "full_rank", "knapsack", "minimax"]
