"""Samples for calibration: those that are fitted on, and others of other sources that judge the fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from onnx_lowrank.batching import safe_batch
from onnx_lowrank.calibration.unfold import Counted
from onnx_lowrank.data import Dataset
from onnx_lowrank.padding import Padding, padding
from onnx_lowrank.plan import MEMORY_LIMIT
from onnx_lowrank.signature import Feeds
from onnx_lowrank.target import Target

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
        largest_batch: Samples that may be run at once; see `suited`.
        padding: Where the samples are padding; None: nowhere.
        unused: How many more there were.
        memory_limit: Bytes that moments of one layer may take.
    """

    fit: Dataset
    judge: Dataset
    largest_batch: int = LARGEST_BATCH
    padding: Padding | None = None
    unused: int = 0
    memory_limit: int = MEMORY_LIMIT

    def __len__(self) -> int:
        return len(self.fit) + len(self.judge)

    def thinned(self, share: float) -> Samples:
        """A share of them, at least a batch to fit on and one to judge, drawn by their content."""
        fit, judge = self.fit.share(share), self.judge.share(share)
        return replace(self, fit=fit, judge=judge, unused=self.unused + len(self) - len(fit) - len(judge))

    def batches(self) -> Iterator[tuple[Feeds, bool, int]]:
        """Feeds, those for fitting first; whether they are; and how many samples are in them."""
        for part, fits in ((self.fit, True), (self.judge, False)):
            for batch in part.batches(min(_batch(part), self.largest_batch)):
                yield batch.feeds, fits, len(batch.rows)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of how they are used."""
        told = () if self.padding is None else (str(self.padding),)
        left_out = f"{self.unused} samples are not used: the activations of more than {len(self)} have no room"
        return (*told, left_out) if self.unused else told

    def counted(self, feeds: Feeds) -> Counted | None:
        """Which positions of a batch count, (samples, positions); None: all."""
        return None if self.padding is None else self.padding.counted(feeds)


def divided(data: Dataset, seed: int) -> tuple[Samples, Dataset]:
    """Samples for calibration, and those held out for the figures reported; see `Dataset.divided`.

    Raises:
        InputError: if there are too few for three parts.
    """
    fit, judge, held_out = data.divided([JUDGE, HELD_OUT], seed)
    return Samples(fit, judge), held_out


def suited(samples: Samples, model: Path, target: Target) -> Samples:
    """The same, in batches no larger than `model` takes on `target`, and without the padding it does not look at."""
    batch = safe_batch(model, samples.judge, target, _batch(samples.judge))
    found = padding(model, samples.fit, target, batch)
    if found is not None and batch > 1 and any(part.arrays[found.mask].shape[1] == batch for part in samples.fit.parts):
        batch -= 1  # with as many samples as positions nothing tells which axis is which
    return replace(samples, largest_batch=batch, padding=found)


def _batch(data: Dataset) -> int:
    """Samples per run: enough to keep the machine busy, few enough to hold their activations."""
    elements = max(part.elements for part in data.parts)
    return min(max(BATCH_ELEMENTS // max(elements, 1), 1), LARGEST_BATCH)
