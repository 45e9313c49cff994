"""PP-OCRv4 text recogniser: a light convolutional trunk with two transformer blocks and a CTC head of 6625 classes.

Metric: character error rate (edit distance over length) on rendered lines, clean and hard apart; the same without
spaces, as most of the original's errors on hard lines are spaces it does not see.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from benchmarks.zoo.agreement import Ratio
from benchmarks.zoo.cache import Arrays
from benchmarks.zoo.model import LABEL, Outputs, Scores, ZooModel
from benchmarks.zoo.session import Session
from benchmarks.zoo.source import Wheel
from benchmarks.zoo.text import TEXT_SOURCES, Typesetter, fitted

RAPIDOCR = Wheel("rapidocr-onnxruntime", "1.4.4", "971d7d5f223a7a808662229df1ef69893809d8457d834e6373d3854bc1782cbf")
HEIGHT, WIDTH = 48, 480
LINES = 500  # of each kind


def rapidocr_model(folder: Path, name: str, target: Path) -> None:
    """Copy one of the wheel's models."""
    shutil.copyfile(folder / "rapidocr_onnxruntime" / "models" / f"{name}.onnx", target)


@dataclass(frozen=True)
class Recognizer(ZooModel):
    """See the module."""

    higher_is_better: ClassVar[bool] = False
    edition: ClassVar[int] = 2
    calibration_samples: ClassVar[int] = 100

    @override
    def export(self, folders: Sequence[Path], target: Path) -> None:
        rapidocr_model(folders[0], "ch_PP-OCRv4_rec_infer", target)

    @override
    def calibration(self, folders: Sequence[Path], original: Path, samples: int) -> Arrays:
        return {"x": _lines(folders, samples, seed=1)["x"]}

    @override
    def evaluation(self, folders: Sequence[Path], original: Path) -> Arrays:
        return _lines(folders, 2 * LINES, seed=2)

    @override
    def score(self, outputs: Outputs, reference: Outputs, data: Arrays, folder: Path) -> Scores:
        alphabet = _alphabet(folder)
        texts, kinds = data[LABEL].T
        pairs = [(greedy_ctc(p, alphabet), str(text)) for p, text in zip(outputs[0], texts, strict=True)]
        bare = [(found.replace(" ", ""), text.replace(" ", "")) for found, text in pairs]
        return _error_rates("cer", pairs, kinds) | _error_rates("letter_error", bare, kinds)


def _error_rates(name: str, pairs: Sequence[tuple[str, str]], kinds: NDArray[Any]) -> dict[str, Ratio]:
    """Edit distance of (found, right) over length, for each kind of line."""
    errors = np.array([edit_distance(found, text) for found, text in pairs], np.float64)
    lengths = np.array([len(text) for _, text in pairs], np.float64)
    return {f"{name}_{k}": (np.where(kinds == k, errors, 0.0), np.where(kinds == k, lengths, 0.0))
            for k in ("hard", "clean")}  # fmt: skip


def _lines(folders: Sequence[Path], samples: int, seed: int) -> dict[str, NDArray[Any]]:
    """Lines alternately hard and clean; a label is (text, kind)."""
    typesetter = Typesetter(folders[1:], seed)
    images: list[NDArray[np.float32]] = []
    labels: list[tuple[str, str]] = []
    for index in range(samples):
        hard = index % 2 == 0
        image, text = typesetter.line(hard=hard, longest=WIDTH / HEIGHT)
        images.append(fitted(image, HEIGHT, WIDTH))
        labels.append((text, "hard" if hard else "clean"))
    return {"x": np.stack(images), LABEL: np.array(labels)}


@cache
def _alphabet(folder: Path) -> list[str]:
    """Class -> character, of the original: blank, the metadata's list, space."""
    return ["", *Session(folder / "model.onnx").metadata["character"].splitlines(), " "]


def greedy_ctc(probabilities: NDArray[Any], alphabet: Sequence[str]) -> str:
    """The most likely class of each step, repetitions merged, blanks (class 0) left out."""
    best = probabilities.argmax(-1)
    new = np.concatenate(([True], best[1:] != best[:-1]))
    return "".join(alphabet[int(c)] for c in best[new & (best != 0)])


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


RECOGNIZER = Recognizer(
    name="ocr_rec",
    family="text recogniser (PP-OCRv4)",
    sources=(RAPIDOCR, *TEXT_SOURCES),
    inputs=("x=1x3x48x320",),
    batch=8,
)
