"""PP-OCR angle classifier: a MobileNetV3 that tells upright lines from upside-down ones; its BatchNorm is unfused.

Metric: accuracy on rendered lines, hard ones among them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from typing_extensions import override

from benchmarks.zoo.cache import Arrays
from benchmarks.zoo.model import LABEL, Outputs, Scores, ZooModel
from benchmarks.zoo.models.ocr_rec import RAPIDOCR, rapidocr_model
from benchmarks.zoo.text import TEXT_SOURCES, Typesetter, fitted

HEIGHT, WIDTH = 48, 192
LINES = 400


@dataclass(frozen=True)
class AngleClassifier(ZooModel):
    """See the module."""

    @override
    def export(self, folders: Sequence[Path], target: Path) -> None:
        rapidocr_model(folders[0], "ch_ppocr_mobile_v2.0_cls_infer", target)

    @override
    def calibration(self, folders: Sequence[Path], original: Path, samples: int) -> Arrays:
        return {"x": _lines(folders, samples, seed=5)["x"]}

    @override
    def evaluation(self, folders: Sequence[Path], original: Path) -> Arrays:
        return _lines(folders, LINES, seed=6)

    @override
    def score(self, outputs: Outputs, reference: Outputs, data: Arrays, folder: Path) -> Scores:
        right = outputs[0].argmax(1) == data[LABEL]
        return {"accuracy": (right.astype(np.float64), np.ones(len(right)))}


def _lines(folders: Sequence[Path], samples: int, seed: int) -> dict[str, NDArray[Any]]:
    """Lines, every other one upside down (label 1), every other pair hard."""
    typesetter = Typesetter(folders[1:], seed)
    images: list[NDArray[np.float32]] = []
    for index in range(samples):
        image, _ = typesetter.line(hard=index // 2 % 2 == 1, longest=WIDTH / HEIGHT)
        turned = image.transpose(Image.Transpose.ROTATE_180) if index % 2 else image
        images.append(fitted(turned, HEIGHT, WIDTH))
    return {"x": np.stack(images), LABEL: np.arange(samples) % 2}


ANGLE_CLASSIFIER = AngleClassifier(
    name="ocr_cls",
    family="angle classifier (MobileNetV3)",
    sources=(RAPIDOCR, *TEXT_SOURCES),
    inputs=("x=1x3x48x192",),
    batch=16,
)
