"""What one layer has to answer to: its inputs in the compressed network, and what the original makes of the originals.

The wanted values t stand in front of the activation that follows, after the other branch of a residual sum has been
added. The layer's own part of it is t - s, with s the other branch in the *compressed* network, so that a layer also
repairs what that branch has lost. Where a ReLU follows, negative values count as zero: wherever t <= 0, anything below
zero is as good.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from onnx_lowrank.layer import Array


@dataclass(frozen=True, eq=False)
class Block:
    """Rows of one batch.

    Args:
        inputs: Reads c, (rows, groups, n).
        wanted: t, (rows, groups, out).
        beside: s, likewise, or None where nothing is added.
    """

    inputs: Callable[[], Array]
    wanted: Array
    beside: Array | None

    @property
    def own(self) -> Array:
        """What the layer itself should answer, t - s."""
        return self.wanted if self.beside is None else self.wanted - self.beside


@dataclass(frozen=True, eq=False)
class LayerData:
    """One layer's rows.

    Args:
        fit: Blocks to fit on.
        judge: Blocks to judge by.
        relu: Whether a ReLU follows.
    """

    fit: Sequence[Block]
    judge: Sequence[Block]
    relu: bool

    def error(self, matrix: Array, bias: Array | None) -> float:
        """Relative error, after the activation, on the judging rows.

        Args:
            matrix: M, (groups, out, n).
            bias: b, (groups, out), or None.
        """
        difference = power = 0.0
        for block in self.judge:
            answer, wanted = answers(block, block.inputs(), matrix, bias), block.wanted
            if self.relu:
                answer, wanted = np.maximum(answer, 0.0), np.maximum(wanted, 0.0)
            known = np.isfinite(wanted)
            difference += float(np.square(np.where(known, answer - wanted, 0.0), dtype=np.float64).sum())
            power += float(np.square(np.where(known, wanted, 0.0), dtype=np.float64).sum())
        if not np.isfinite(difference):
            return math.inf
        return math.sqrt(difference / power) if power > 0 else float(difference > 0)

    def relaxed(self, matrix: Array, bias: Array | None) -> Iterator[tuple[Array, Array]]:
        """Rows to fit on and targets that forgive what the ReLU hides, given the present answers.

        For t > 0 the target is t, else the present answer where it is negative and 0 where it is not: the squared error
        to it is never below that after the ReLU, and equal to it at the present answers where t <= 0, so that fitting
        to these targets again and again lowers the error after the ReLU (majorization; Zhang et al., TPAMI 2016, 3.3).
        """
        for block in self.fit:
            rows = block.inputs()
            answer = answers(block, rows, matrix, bias)
            target = np.where(block.wanted > 0, block.wanted, np.minimum(answer, 0.0))
            yield rows, target if block.beside is None else target - block.beside


def answers(block: Block, rows: Array, matrix: Array, bias: Array | None) -> Array:
    """M c + b + s, (rows, groups, out), in the rows' own precision."""
    kind = rows.dtype
    result = np.matmul(rows.swapaxes(0, 1), matrix.astype(kind).swapaxes(1, 2)).swapaxes(0, 1)
    if bias is not None:
        result = result + bias.astype(kind)
    return result if block.beside is None else result + block.beside
