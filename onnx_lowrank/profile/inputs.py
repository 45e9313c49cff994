"""What the models of a benchmark run on, where the user gives no sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from onnx_lowrank.latency.race import Weighted
from onnx_lowrank.signature import index_bounds, signature_of
from onnx_lowrank.synthetic import at_batch, resolve_shapes, synthetic_feeds
from onnx_lowrank.target import InputShapes, Target


@dataclass(frozen=True, eq=False)
class Inputs:
    """One sample per set of shapes, weighted, and notes on what had to be guessed."""

    samples: Sequence[Weighted]
    notes: tuple[str, ...] = ()


def drawn(models: Sequence[Path], target: Target, batch: int | None) -> Inputs:
    """Inputs drawn to fit the first model's signature.

    Args:
        models: All of them must take the batch.
        target: Gives the sets of shapes.
        batch: Size of the batch, in place of the one in the shapes; None: as the shapes say.

    Raises:
        InputError: for shapes that do not fit, or a batch that one of the models does not take.
    """
    first = onnx.load(models[0], load_external_data=False)
    bounds, samples, notes = index_bounds(first), list[Weighted](), dict[str, None]()
    if batch is not None:
        for path in models[1:]:
            at_batch(signature_of(onnx.load(path, load_external_data=False)).inputs, {}, batch, str(path))
    for entry in target.shapes or (InputShapes({}),):
        inputs, shapes = signature_of(first).inputs, entry.shapes
        if batch is not None:
            inputs, shapes = at_batch(inputs, shapes, batch, str(models[0]))
        resolved, guesses = resolve_shapes(inputs, shapes)
        samples.append((synthetic_feeds(inputs, resolved, 0, bounds), entry.weight))
        notes |= dict.fromkeys(guesses)
    return Inputs(samples, tuple(notes))
