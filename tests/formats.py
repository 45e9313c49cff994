"""Every decomposition as the contract suite runs it: iterations cut short, and a few ranks of each."""

from __future__ import annotations

import math

from onnx_lowrank.decomposition import Decomposition, Rank
from onnx_lowrank.layer import LayerShape
from onnx_lowrank.passes.decompose import decompositions
from onnx_lowrank.passes.decompose.block_term import BlockTerm
from onnx_lowrank.passes.decompose.cp import Cp, CpSpatial
from onnx_lowrank.passes.decompose.network import NetworkFormat

_QUICK = (Cp(restarts=0, sweeps=6), CpSpatial(restarts=0, sweeps=6), BlockTerm(restarts=0, sweeps=6))
# Tensor networks are told apart: no one rank is exact for all ways to cut their channels. EVERY has them, too.
_ALL = {name: method for name, method in decompositions().items() if not isinstance(method, NetworkFormat)}
METHODS = _ALL | {method.name: method for method in _QUICK}
EVERY = decompositions() | METHODS
FEW = 4


def some_ranks(method: Decomposition, shape: LayerShape) -> list[Rank]:
    """Every rank the layer can have where they are few; else some of those that are priced. The exact one is last."""
    limit = method.exact_rank(shape)
    assert limit is not None
    if not method.on_request and method not in _QUICK and math.prod(limit) <= 64:
        return [tuple(int(i) + 1 for i in index) for index in _indices(limit)]
    priced = [rank for rank in method.ranks(shape, 1) if rank != limit]
    return [*priced[:: max(1, len(priced) // FEW)], limit]


def comparable(method: Decomposition, less: Rank, more: Rank) -> bool:
    """Whether `more` keeps at least as much of the weight as `less`, arranged in the same way."""
    cut = method.structure
    return less[:cut] == more[:cut] and all(a <= b for a, b in zip(less, more, strict=True))


def _indices(limit: Rank) -> list[Rank]:
    found: list[Rank] = [()]
    for most in limit:
        found = [(*index, i) for index in found for i in range(most)]
    return found
