"""Two model files run on the same inputs: on the target, or with onnx.reference where the target lacks kernels.

Models that are large together are open one after the other, never both: the outputs of one are held, up to a limit,
until the other has run on the same inputs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, ValueInfoProto
from onnx.reference import ReferenceEvaluator

from onnx_lowrank.data import Dataset
from onnx_lowrank.graph.size import LARGE_BYTES, file_bytes
from onnx_lowrank.runtime import UnsupportedTypeError, open_session
from onnx_lowrank.signature import Feeds, index_bounds, signature_of
from onnx_lowrank.synthetic import batch_size, leading_size, resolve_shapes, synthetic_feeds
from onnx_lowrank.target import Target

logger = logging.getLogger(__name__)
Outputs = Mapping[str, object]
Run = Callable[[Feeds], Outputs]
Batch = tuple[Feeds, int]  # feeds and the number of samples in them

SYNTHETIC_BATCHES = 8
HELD_BYTES = 256 << 20
_REFERENCE_BATCHES = 2
_SMALL_IMAGE, _SMALL_OTHER = 32, 8


@dataclass(frozen=True, eq=False)
class Pair:
    """Two models to be run on the same inputs.

    Args:
        first: Opens the first model.
        second: Opens the second one.
        engine: "onnxruntime", or "onnx.reference" for element types the provider has no kernels for.
        hold_bytes: Bytes of outputs of the first to collect before the second runs.
    """

    first: Callable[[], Run]
    second: Callable[[], Run]
    engine: str
    hold_bytes: int = 0

    @property
    def exact(self) -> bool:
        """Whether the models run on the target itself."""
        return self.engine == "onnxruntime"

    def outputs(self, batches: Iterable[Batch]) -> Iterator[tuple[Outputs, Outputs, int]]:
        """Outputs of both models and number of samples, batch by batch."""
        rest = iter(batches)
        for head in rest:
            held = self._ahead(chain([head], rest))
            run = self.second()
            for feeds, count, before in held:
                yield before, run(feeds), count
            del run  # closes it before the first is opened again

    def _ahead(self, batches: Iterator[Batch]) -> list[tuple[Feeds, int, Outputs]]:
        run, held, size = self.first(), list[tuple[Feeds, int, Outputs]](), 0
        for feeds, count in batches:
            held.append((feeds, count, run(feeds)))
            size += sum(array.nbytes for array in held[-1][2].values() if isinstance(array, np.ndarray))
            if size >= self.hold_bytes:
                break
        return held


def open_pair(original: Path, optimized: Path, target: Target, expose: Collection[str] = ()) -> Pair:
    """Make two model files ready to run at the target's first optimization level, in plain float32 arithmetic.

    Args:
        original: One file.
        optimized: The other one.
        target: Where to run.
        expose: Tensors of both main graphs that become outputs beside the models' own.

    Raises:
        InputError, ProviderError: if a model cannot be opened.
    """
    target = target.exact()

    def opened(path: Path) -> Run:
        if not expose:
            return open_session(path, target, target.levels[0]).run
        serialized = _exposing(path, expose).SerializeToString()
        return open_session(serialized, target, target.levels[0], folder=path.parent).run

    try:
        first = opened(original)
        if file_bytes(original) + file_bytes(optimized) > LARGE_BYTES:
            return Pair(lambda: opened(original), lambda: opened(optimized), "onnxruntime", HELD_BYTES)
        second = opened(optimized)
    except UnsupportedTypeError as error:
        logger.info("run with onnx.reference: %s", error)
        return Pair(lambda: _reference(original, expose), lambda: _reference(optimized, expose), "onnx.reference")
    return Pair(lambda: first, lambda: second, "onnxruntime")


def batches_for(
    model: ModelProto, target: Target, dataset: Dataset | None, *, seed: int, small: bool
) -> tuple[Iterator[Batch], list[str]]:
    """What to run models on, and notes on what had to be guessed.

    Args:
        model: Gives the signature; weights may be missing from the message.
        target: Gives the shapes of synthetic inputs.
        dataset: Samples, or None for inputs drawn to fit the signature.
        seed: Of synthetic inputs.
        small: Few and small ones, for onnx.reference.
    """
    inputs = signature_of(model).inputs
    if dataset is not None:
        size = dataset.batch or batch_size(inputs, target)
        used = dataset.take(slice(_REFERENCE_BATCHES * size)) if small else dataset
        return ((batch.feeds, len(batch.rows)) for batch in used.batches(size)), list(dataset.notes)
    sizes = (_SMALL_IMAGE, _SMALL_OTHER) if small else ()
    given = [entry.shapes for entry in target.shapes] or [{}]
    resolved = [resolve_shapes(inputs, shapes, *sizes) for shapes in given]
    bounds = index_bounds(model)
    number = _REFERENCE_BATCHES if small else max(SYNTHETIC_BATCHES, len(resolved))

    def draw() -> Iterator[Batch]:
        for i in range(number):
            shapes = resolved[i % len(resolved)][0]
            yield synthetic_feeds(inputs, shapes, seed + i, bounds), leading_size(inputs, shapes)

    return draw(), sorted({note for _, notes in resolved for note in notes})


def _exposing(path: Path, expose: Collection[str]) -> ModelProto:
    model = onnx.load(path, load_external_data=False)
    own = {value.name for value in model.graph.output}
    model.graph.output.extend(ValueInfoProto(name=name) for name in expose if name not in own)
    return model


def _reference(path: Path, expose: Collection[str]) -> Run:
    model = _exposing(path, expose)
    onnx.load_external_data_for_model(model, str(path.parent))
    evaluator = ReferenceEvaluator(model)
    names = [str(name) for name in evaluator.output_names]

    def run(feeds: Feeds) -> Outputs:
        return dict(zip(names, evaluator.run(None, dict(feeds)), strict=True))

    return run
