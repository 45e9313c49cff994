"""How many samples a model takes at once: an open batch dimension in a file is no promise that any batch works."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from onnx_lowrank.data import Dataset
from onnx_lowrank.errors import InputError
from onnx_lowrank.runtime import open_session
from onnx_lowrank.target import Target

ROUNDING = 1e-3


def safe_batch(model: Path, data: Dataset, target: Target, wanted: int) -> int:
    """`wanted`, or 1 where the first of several samples does not get the outputs it gets alone.

    Args:
        model: The file.
        data: Samples; a batch size the model fixes wins.
        target: Where it runs.
        wanted: Samples to run at once.
    """
    batch = next(data.batches(wanted))
    count = len(batch.rows)
    if count == 1 or data.batch is not None:
        return data.batch or 1
    session = open_session(model, target, target.levels[0])
    try:
        together = session.run(batch.feeds)
    except InputError:
        return 1
    alone = session.run(next(data.take(batch.rows).feeds(1)))
    return wanted if all(_first(together[name], count, one) for name, one in alone.items()) else 1


def _first(many: object, count: int, one: object) -> bool:
    """Whether `one` is the first of `count` samples in `many`, up to rounding; sequences and maps never are."""
    if not (isinstance(many, np.ndarray) and isinstance(one, np.ndarray)):
        return False
    if many.shape != (count, *one.shape[1:]) or one.shape[:1] != (1,):
        return False
    if one.dtype.kind != "f":
        return bool((many[:1] == one).all())
    scale = float(np.abs(one[np.isfinite(one)]).max(initial=0.0))
    return bool(np.allclose(many[:1], one, rtol=0.0, atol=ROUNDING * scale, equal_nan=True))
