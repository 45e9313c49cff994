"""The channel block, from the latencies of a few ranks. Like `turns`, part of the script that `latency request` writes.

A chain is timed at ranks between 32 and 64. If b is the kernels' block, stepping down from a multiple of 2b by b saves
about its share of the time; a smaller step saves nothing, or costs what leaving the blocked layout costs.
"""

from __future__ import annotations

from collections.abc import Mapping

_LOW, _HIGH = 32, 64
_BLOCKS = (4, 8, 16)
_LARGEST = 32
BLOCKS = (*_BLOCKS, _LARGEST)
PROBED_RANKS = tuple(sorted({_LOW, _HIGH} | {rank for block in _BLOCKS for rank in (_LOW + block, _HIGH - block)}))
PROBE_ROUNDS = 61
# Where twice the rank costs hardly more, launching costs more than computing, and nothing can be read from steps.
_TELLING = 1.25
UNTOLD = 8  # tensor cores take channels in eights


def smallest_block(latency: Mapping[int, float]) -> int:
    """The smallest block by which a rank can step down and save at least a third of its share; else the largest.

    `UNTOLD` where the highest rank takes hardly longer than the lowest.

    Args:
        latency: Rank -> latency in any unit, for `PROBED_RANKS`.
    """
    if latency[_HIGH] < _TELLING * latency[_LOW]:
        return UNTOLD
    per_rank = (latency[_HIGH] - latency[_LOW]) / (_HIGH - _LOW)
    for block in _BLOCKS:
        steps = ((rank, rank + block) for rank in (_LOW + block, _HIGH - block))
        if all(latency[upper] - latency[rank] >= block * per_rank / 3 for rank, upper in steps):
            return block
    return _LARGEST
