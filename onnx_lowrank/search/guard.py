"""The guard: a chain that saves next to nothing by itself stays only if the finished model is slower without it.

Chains are priced alone. In the model one may break up a layout or a fusion that it was not charged for, and then its
layer loses accuracy for nothing. So the model is built again without the doubtful chains and raced against itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from onnx_lowrank.candidates import Candidate
from onnx_lowrank.search.attempt import Attempt
from onnx_lowrank.search.table import Row

# A chain that takes more than this share of its layer's time is doubtful.
DOUBTFUL = 0.95
# How many of them are tried one by one; every trial is a model to build and to time.
MOST_ALONE = 4


def doubtful(chosen: Sequence[Candidate], rows: Sequence[Row]) -> list[str]:
    """Keys of the layers whose chains save next to nothing by themselves, those that save least first."""
    dense = {row.layer.key: row.keep.cost("ms") for row in rows if row.factorable}
    saved = {c.key: dense[c.key] - c.cost("ms") for c in chosen if c.chain is not None}
    return sorted((key for key in saved if saved[key] < (1 - DOUBTFUL) * dense[key]), key=lambda key: saved[key])


def guarded(
    best: Attempt, keys: Sequence[str], without: Callable[[Collection[str]], Attempt | None]
) -> tuple[Attempt, tuple[str, ...]]:
    """The best attempt with layers put back, and their keys: all of `keys`, or those that can be spared one by one.

    Args:
        best: The attempt.
        keys: Doubtful layers, to be tried in this order.
        without: The attempt with some layers kept, None where it is worse for it.
    """
    if not keys:
        return best, ()
    if (other := without(keys)) is not None:
        return other, tuple(sorted(keys))
    back: tuple[str, ...] = ()
    for key in keys[:MOST_ALONE]:
        if len(back) + 1 == len(keys):  # all of them: tried before
            break
        if (other := without((*back, key))) is not None:
            best, back = other, (*back, key)
    return best, tuple(sorted(back))
