"""PP-OCRv4 text detector: a light trunk and a feature pyramid giving a probability map (DBNet).

Liao et al., Real-Time Scene Text Detection with Differentiable Binarization, AAAI 2020.

Metric: F1 of the phrases' boxes at an intersection over union of .5, on rendered pages.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import find_objects, label
from typing_extensions import override

from benchmarks.zoo.cache import Arrays
from benchmarks.zoo.model import LABEL, Outputs, Scores, ZooModel
from benchmarks.zoo.models.ocr_rec import RAPIDOCR, rapidocr_model
from benchmarks.zoo.text import TEXT_SOURCES, Typesetter, normalized

SIZE = 640
PAGES = 40
THRESHOLD, UNCLIP, SMALLEST, OVERLAP = 0.3, 1.6, 3, 0.5


@dataclass(frozen=True)
class Detector(ZooModel):
    """See the module."""

    @override
    def export(self, folders: Sequence[Path], target: Path) -> None:
        rapidocr_model(folders[0], "ch_PP-OCRv4_det_infer", target)

    @override
    def calibration(self, folders: Sequence[Path], original: Path, samples: int) -> Arrays:
        return {"x": _pages(folders, min(samples, 16), seed=3)["x"]}

    @override
    def evaluation(self, folders: Sequence[Path], original: Path) -> Arrays:
        return _pages(folders, PAGES, seed=4)

    @override
    def score(self, outputs: Outputs, reference: Outputs, data: Arrays, folder: Path) -> Scores:
        found = [boxes(probability[0]) for probability in outputs[0]]
        truth = [page[page[:, 0] >= 0] for page in data[LABEL]]
        hits = np.array([matches(a, b) for a, b in zip(found, truth, strict=True)], np.float64)
        counts = np.array([len(a) + len(b) for a, b in zip(found, truth, strict=True)], np.float64)
        return {"box_f1": (2 * hits, counts)}


def _pages(folders: Sequence[Path], samples: int, seed: int) -> dict[str, NDArray[np.float32]]:
    """Pages and their boxes, padded with rows of -1 to a common number."""
    typesetter = Typesetter(folders[1:], seed)
    pages = [typesetter.page(SIZE) for _ in range(samples)]
    most = max(len(found) for _, found in pages)
    labels = [np.pad(found, ((0, most - len(found)), (0, 0)), constant_values=-1) for _, found in pages]
    return {"x": np.stack([normalized(image) for image, _ in pages]), LABEL: np.stack(labels)}


def boxes(probability: NDArray[Any]) -> NDArray[np.float64]:
    """Boxes (left, top, right, bottom) of the map's connected components.

    The network is trained on shrunk regions; each box is grown back by 1.6 times its area over its perimeter.
    """
    components = cast("tuple[NDArray[Any], int]", label(probability > THRESHOLD))[0]
    found: list[tuple[float, ...]] = []
    for rows, columns in find_objects(components):
        height, width = rows.stop - rows.start, columns.stop - columns.start
        if min(height, width) < SMALLEST:
            continue
        grow = UNCLIP * height * width / (2 * (height + width))
        found.append((columns.start - grow, rows.start - grow, columns.stop + grow, rows.stop + grow))
    return np.array(found, np.float64).reshape(-1, 4)


def matches(found: NDArray[Any], truth: NDArray[Any]) -> int:
    """How many pairs of boxes overlap enough; above .5 nearly every box has one partner, so pairing is greedy."""
    low = np.maximum(found[:, None, :2], truth[None, :, :2])
    high = np.minimum(found[:, None, 2:], truth[None, :, 2:])
    shared = (high - low).clip(0).prod(-1)
    area_found, area_truth = ((b[:, 2:] - b[:, :2]).prod(-1) for b in (found, truth))
    overlap = shared / (area_found[:, None] + area_truth - shared)
    hits = 0
    while overlap.size and overlap.max() >= OVERLAP:
        row, column = np.unravel_index(overlap.argmax(), overlap.shape)
        overlap[row], overlap[:, column] = 0, 0
        hits += 1
    return hits


DETECTOR = Detector(
    name="ocr_det",
    family="text detector (PP-OCRv4)",
    sources=(RAPIDOCR, *TEXT_SOURCES),
    inputs=("x=1x3x640x640",),
    batch=2,
)
