"""Samples for calibration: those that are fitted on, and others of other sources that judge the fit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from onnx_lowrank.data import Dataset
from onnx_lowrank.signature import Feeds

BATCH_ELEMENTS = 1 << 19
LARGEST_BATCH = 32
HELD_OUT = 1 / 8
JUDGE = 1 / 8


@dataclass(frozen=True, eq=False)
class Samples:
    """Two disjoint parts of the data.

    Args:
        fit: Moments are taken from these.
        judge: Fits are chosen by these, and losses probed on them.
    """

    fit: Dataset
    judge: Dataset

    def __len__(self) -> int:
        return len(self.fit) + len(self.judge)

    def batches(self) -> Iterator[tuple[Feeds, bool, int]]:
        """Feeds, those for fitting first; whether they are; and how many samples are in them."""
        for part, fits in ((self.fit, True), (self.judge, False)):
            for batch in part.batches(_batch(part)):
                yield batch.feeds, fits, len(batch.rows)


def divided(data: Dataset, seed: int) -> tuple[Samples, Dataset]:
    """Samples for calibration, and those held out for the figures reported, by whole sources where these are named.

    Raises:
        InputError: if there are too few for three parts.
    """
    rest, held_out = data.split(HELD_OUT, seed)
    fit, judge = rest.split(JUDGE / (1 - HELD_OUT), seed + 1)
    return Samples(fit, judge), held_out


def _batch(data: Dataset) -> int:
    """Samples per run: enough to keep the machine busy, few enough to hold their activations."""
    feeds = next(data.feeds(1))
    elements = sum(math.prod(array.shape) for array in feeds.values())
    return min(max(BATCH_ELEMENTS // max(elements, 1), 1), LARGEST_BATCH)
