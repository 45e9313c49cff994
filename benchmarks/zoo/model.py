"""The protocol of a zoo model: where it comes from, how it is built, what it is fed, how well it does its task."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

from benchmarks.zoo.cache import Arrays, appearing_whole, save_arrays
from benchmarks.zoo.session import Session
from benchmarks.zoo.source import Source

Outputs: TypeAlias = Sequence[NDArray[Any]]
Scores: TypeAlias = Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]]
"""Metric name -> (numerator, denominator) of each sample; the metric is the ratio of their sums, over all samples."""

LABEL = "label"
SOURCE = "source"
"""What a sample was cut from, (samples,) integers: samples of one source are no independent ones."""

EDITION = "edition"


@dataclass(frozen=True)
class ZooModel(ABC):
    """A model of the zoo.

    Attributes:
        name: Folder in the cache and name on the command line.
        family: What kind of network it is.
        sources: Archives the model and its data are made of; the first holds the weights.
        inputs: Shapes used for timing, as the command line takes them: `NAME=1x3x256x256`.
        batch: Samples fed at once during evaluation.
        higher_is_better: Whether the metric is; for all metrics of the model.
        edition: Raised whenever the model's data change; a cache of another edition is made anew.
        calibration_samples: How many samples `calibration.npz` holds.
    """

    higher_is_better: ClassVar[bool] = True
    edition: ClassVar[int] = 1
    calibration_samples: ClassVar[int] = 64

    name: str
    family: str
    sources: tuple[Source, ...]
    inputs: tuple[str, ...]
    batch: int = 1

    @abstractmethod
    def export(self, folders: Sequence[Path], target: Path) -> None:
        """Write the ONNX file, given the unpacked folder of each source."""

    @abstractmethod
    def calibration(self, folders: Sequence[Path], original: Path, samples: int) -> Arrays:
        """Data to calibrate on, disjoint from `evaluation`: arrays named like graph inputs, leading axis = samples.

        Samples cut from the same photograph or file share a number under `source`.
        """

    @abstractmethod
    def evaluation(self, folders: Sequence[Path], original: Path) -> Arrays:
        """Data to measure on, named like `calibration`'s, with labels under `label` where the task has them."""

    @abstractmethod
    def score(self, outputs: Outputs, reference: Outputs, data: Arrays, folder: Path) -> Scores:
        """Score one batch.

        Args:
            outputs: What the measured model returned.
            reference: What the original returned.
            data: The batch of `evaluation`.
            folder: Where the original lies, with what `evaluation` may have left beside it.
        """

    def build(self, cache: Path) -> Path:
        """Fetch the sources and write model, calibration and evaluation data, unless the cache holds them.

        Returns:
            The path of the ONNX file.
        """
        folder = cache / self.name
        model, calibration, evaluation = (folder / n for n in ("model.onnx", "calibration.npz", "evaluation.npz"))
        stamp = folder / EDITION
        held = int(stamp.read_text()) if stamp.is_file() else 1
        if held == self.edition and model.is_file() and calibration.is_file() and evaluation.is_file():
            return model
        folders = [source.fetch(cache) for source in self.sources]
        if not model.is_file():
            with appearing_whole(model) as partial:
                self.export(folders, partial)
        if held != self.edition or not calibration.is_file():
            save_arrays(calibration, self.calibration(folders, model, self.calibration_samples))
        if held != self.edition or not evaluation.is_file():
            save_arrays(evaluation, self.evaluation(folders, model))
        with appearing_whole(stamp) as partial:
            partial.write_text(f"{self.edition}\n")
        return model

    def run(self, session: Session, data: Arrays) -> list[NDArray[Any]]:
        """Run one batch; models that carry a state from frame to frame override this."""
        return session.run({name: array for name, array in data.items() if name in session.inputs})
