"""The user's model and data, read and checked."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from onnx_lowrank.calibration.samples import Samples, divided
from onnx_lowrank.data import Dataset, read_samples
from onnx_lowrank.errors import InputError
from onnx_lowrank.graph import io
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.plan import MEMORY_LIMIT
from onnx_lowrank.settings import Settings
from onnx_lowrank.signature import Signature, signature_of

logger = logging.getLogger(__name__)
SPLIT_SEED = 0


@dataclass(frozen=True, eq=False)
class Source:
    """The user's model and data, read and checked.

    Args:
        path: The file.
        graph: Its content; normalizing edits it.
        sha256: Of the file and its external data.
        signature: Inputs and outputs.
        data: Unlabelled samples, or None.
        samples: Those to calibrate with and to choose by; None without data, or where they are too few.
        held_out: The others, which only reports use.
        labelled: Labelled samples, or None.
    """

    path: Path
    graph: Graph
    sha256: str
    signature: Signature
    data: Dataset | None
    samples: Samples | None
    held_out: Dataset | None
    labelled: Dataset | None

    @property
    def choosing(self) -> Dataset | None:
        """The half of the labelled samples that a search for a drop of the metric may choose by."""
        return None if self._halves is None else self._halves[0]

    @property
    def reporting(self) -> Dataset | None:
        """The other half, on which such a search is reported."""
        return None if self._halves is None else self._halves[1]

    @cached_property
    def _halves(self) -> tuple[Dataset, Dataset] | None:
        return None if self.labelled is None else self.labelled.split(0.5, SPLIT_SEED)


def source_of(model: Path, settings: Settings) -> Source:
    """The model and the data that a user's settings name; see `read_source`."""
    return read_source(
        model,
        settings.calibration,
        settings.eval,
        preprocess=settings.preprocess,
        limit=settings.samples,
        memory_limit=settings.memory_limit,
    )


def read_source(
    path: Path,
    calibration: Path | str | None = None,
    labelled: Path | str | None = None,
    *,
    preprocess: str | None = None,
    limit: int | None = None,
    memory_limit: int = MEMORY_LIMIT,
) -> Source:
    """Read a model and the data that go with it.

    Args:
        path: The model.
        calibration: Unlabelled samples, see `data.read_samples`.
        labelled: Labelled samples; those of `calibration` that are among them are left out.
        preprocess: How images become arrays.
        limit: How many of `calibration` to use at most.
        memory_limit: Bytes that moments of one layer may take.

    Raises:
        InputError: if a file cannot be used; the model is looked at first.
    """
    graph = io.load(path)
    signature = signature_of(graph.to_proto())
    inputs = signature.inputs
    data = None if calibration is None else read_samples(calibration, inputs, preprocess=preprocess, limit=limit)
    labels = None if labelled is None else read_samples(labelled, inputs, preprocess=preprocess)
    if labels is not None and labels.labels is None:
        raise InputError(f"{labelled} without an array 'label'", "labelled samples", "add labels, or leave --eval out")
    if data is not None:
        data = (data if labels is None else _unreported(data, labels)).by_content()
    samples, held_out = None, data
    if data is not None:
        try:
            samples, held_out = divided(data, SPLIT_SEED)
            samples = replace(samples, memory_limit=memory_limit)
        except InputError as error:
            logger.warning("no calibration: %s", error)
    return Source(path, graph, io.model_sha256(path), signature, data, samples, held_out, labels)


def _unreported(data: Dataset, labelled: Dataset) -> Dataset:
    """The calibration samples that no metric is taken on, in whole batches.

    Raises:
        InputError: if there are none.
    """
    others = data.without(labelled)
    if others is None:
        found = f"{len(data)} calibration samples of {data.origin} that are all among those of --eval"
        raise InputError(found, "some to fit on that the metric is not taken on", "give others, or leave one out")
    left_out = len(data) - len(others)
    if not left_out:
        return data
    note = f"{left_out} calibration samples are among those of --eval and are left out"
    return replace(others, notes=(*data.notes, note)).in_whole_batches()
