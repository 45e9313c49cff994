"""Which positions of the samples are padding: those whose content was seen to make no difference to any output.

Texts of different lengths are padded to one, and a mask of zeros and ones says where. Fitted like the others, rows of
padding outweigh those that matter: three quarters of all rows in a set of short sentences. No name is trusted: what
the model is fed where a mask is zero is exchanged, and the outputs must stay what they are.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.data import Dataset
from onnx_lowrank.errors import InputError
from onnx_lowrank.runtime import Session, open_session
from onnx_lowrank.signature import Feeds
from onnx_lowrank.target import Target

logger = logging.getLogger(__name__)
ROUNDING = 1e-5


@dataclass(frozen=True)
class Padding:
    """Where samples are padding.

    Args:
        mask: The input that is zero there.
        share: Of the positions of the samples looked at.
    """

    mask: str
    share: float

    def counted(self, feeds: Feeds) -> NDArray[np.bool_]:
        """Which positions count, (samples, positions)."""
        return feeds[self.mask] != 0

    def __str__(self) -> str:
        """What the user should know."""
        what = f"{self.share:.0%} of the positions are padding that no output depends on ({self.mask})"
        return f"{what}: left out of layers that see them one by one"


def padding(model: Path, data: Dataset, target: Target, batch: int) -> Padding | None:
    """The padding of `data`, or None where there is none or the outputs of `model` depend on it.

    Args:
        model: The file.
        data: Samples; one batch of each shape is run.
        target: Where it runs.
        batch: Samples to run at once.
    """
    shares = {name: share for name, share in _shares(data).items() if 0 < share < 1}
    if not shares:
        return None
    session = open_session(model, target, target.levels[0])
    for name, share in shares.items():
        tried = [_same_without(session, feeds, name) for feeds in _one_batch_each(data, batch)]
        told = [same for same in tried if same is not None]
        if told and all(told):
            return Padding(name, share)
        logger.info("what is fed where %s is zero makes a difference", name)
    return None


def _shares(data: Dataset) -> dict[str, float]:
    """Share of zeros of every input that looks like a mask: 0 and 1 only, (samples, positions), a 1 in every row."""
    found: dict[str, float] = {}
    for name in data.parts[0].arrays:
        masks = [part.arrays[name] for part in data.parts]
        if name not in data.whole and all(_is_mask(mask) for mask in masks):
            found[name] = 1 - sum(int((mask != 0).sum()) for mask in masks) / sum(mask.size for mask in masks)
    return found


def _is_mask(array: NDArray[np.generic]) -> bool:
    return array.ndim == 2 and bool(np.isin(array, (0, 1)).all()) and bool((array != 0).any(axis=1).all())


def _one_batch_each(data: Dataset, batch: int) -> Iterator[Feeds]:
    seen: set[tuple[tuple[int, ...], ...]] = set()
    for feeds in data.feeds(batch):
        shapes = tuple(array.shape[1:] for array in feeds.values())
        if shapes not in seen:
            seen.add(shapes)
            yield feeds


def _same_without(session: Session, feeds: Feeds, mask: str) -> bool | None:
    """Whether outputs stay when everything else that is fed where `mask` is zero is exchanged; None: nothing is."""
    counted = feeds[mask] != 0
    other = {name: _exchanged(array, counted) if name != mask else array for name, array in feeds.items()}
    if all(np.array_equal(array, feeds[name]) for name, array in other.items()):
        return None
    before = session.run(feeds)
    try:
        after = session.run(other)
    except InputError:  # not something this model can be fed with
        return False
    if not any(_is_float(value) for value in before.values()):
        return False  # labels do not flip by every change
    return all(_alike(before[name], after[name]) for name in before)


def _exchanged(array: NDArray[np.generic], counted: NDArray[np.bool_]) -> NDArray[np.generic]:
    """With the first value that counts of each sample wherever none does."""
    if array.shape[:2] != counted.shape:
        return array
    first = array[np.arange(len(array)), counted.argmax(axis=1)]
    shape = counted.shape + (1,) * (array.ndim - 2)
    return np.where(counted.reshape(shape), array, first[:, None])


def _is_float(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "f"


def _alike(one: object, other: object) -> bool:
    if not (isinstance(one, np.ndarray) and isinstance(other, np.ndarray)) or one.shape != other.shape:
        return False
    if one.dtype.kind != "f":
        return bool((one == other).all())
    finite = np.isfinite(one)
    if not np.array_equal(one[~finite], other[~finite], equal_nan=True):
        return False
    scale = float(np.abs(one[finite]).max(initial=0.0))
    return bool(np.allclose(one[finite], other[finite], rtol=0.0, atol=ROUNDING * scale))
