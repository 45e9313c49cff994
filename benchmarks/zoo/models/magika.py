"""Magika file type classifier: byte embeddings, one wide convolution with 84 % of the weights, a dense head.

Metric: accuracy on the files of a few published packages, by their extension.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from benchmarks.zoo.agreement import hits, top1
from benchmarks.zoo.cache import Arrays
from benchmarks.zoo.model import LABEL, Outputs, Scores, ZooModel
from benchmarks.zoo.models.ocr_rec import RAPIDOCR
from benchmarks.zoo.source import Wheel
from benchmarks.zoo.text import TEXT_SOURCES

BLOCK, EACH_END, PADDING, SMALLEST = 4096, 1024, 256, 64
PER_EXTENSION = 80
LABELS = {".py": "python", ".js": "javascript", ".ts": "typescript", ".html": "html", ".css": "css", ".json": "json",
          ".rst": "rst", ".md": "markdown", ".yaml": "yaml", ".toml": "toml", ".po": "po", ".sty": "latex",
          ".jinja": "jinja", ".png": "png", ".jpg": "jpeg", ".ttf": "ttf", ".onnx": "onnx", ".gz": "gzip"}  # fmt: skip
MODEL = Path("magika", "models", "standard_v3_3")


@dataclass(frozen=True)
class Magika(ZooModel):
    """See the module."""

    @override
    def export(self, folders: Sequence[Path], target: Path) -> None:
        shutil.copyfile(folders[0] / MODEL / "model.onnx", target)

    @override
    def calibration(self, folders: Sequence[Path], original: Path, samples: int) -> Arrays:
        return {"bytes": _files(folders, odd=True)["bytes"][: 4 * samples]}

    @override
    def evaluation(self, folders: Sequence[Path], original: Path) -> Arrays:
        return _files(folders, odd=False)

    @override
    def score(self, outputs: Outputs, reference: Outputs, data: Arrays, folder: Path) -> Scores:
        return {
            "accuracy": hits(outputs[0].argmax(1) == data[LABEL]),
            "top1_agreement": top1(outputs[0], reference[0]),
        }


def _files(folders: Sequence[Path], *, odd: bool) -> dict[str, NDArray[np.int32]]:
    """Every other file of each known extension, shuffled, and the index of its type."""
    types: list[str] = json.loads((folders[0] / MODEL / "config.min.json").read_text("utf-8"))["target_labels_space"]
    samples = [
        (features(content), types.index(label))
        for extension, label in LABELS.items()
        for content in list(_contents(folders, extension))[int(odd) :: 2][:PER_EXTENSION]
    ]
    order = np.random.default_rng(15).permutation(len(samples))
    rows, labels = zip(*(samples[i] for i in order), strict=True)
    return {"bytes": np.stack(rows), LABEL: np.array(labels, np.int32)}


def _contents(folders: Sequence[Path], extension: str) -> Iterator[bytes]:
    """Files of an extension in a fixed order, without those too short to tell."""
    for folder in folders:
        for path in sorted(folder.rglob(f"*{extension}")):
            if path.is_file() and path.stat().st_size >= SMALLEST:
                yield path.read_bytes()


def features(content: bytes) -> NDArray[np.int32]:
    """The first and last 1024 bytes without surrounding white space, padded with 256; (2048,)."""
    first, last = content[:BLOCK].lstrip()[:EACH_END], content[-BLOCK:].rstrip()[-EACH_END:]
    result = np.full(2 * EACH_END, PADDING, np.int32)
    result[: len(first)] = np.frombuffer(first, np.uint8)
    result[len(result) - len(last) :] = np.frombuffer(last, np.uint8)
    return result


MAGIKA = Magika(
    name="magika",
    family="file type classifier (1-d convolution)",
    sources=(
        Wheel("magika", "1.0.3", "3e9b49134e8116ee40b431664dcbed9e199413efddcce1a173c734b4e0521529"),
        Wheel("bokeh", "3.6.0", "699e0df76cdfe54b5f574738647bd0ce230fa44fa0fcda5923e1f0f550f83d74"),
        Wheel("sphinx", "8.1.3", "09719015511837b76bf6e03e42eb7595ac8c2e41eeb9c29c5b755c6b677992a2"),
        Wheel("foolbox", "3.3.4", "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb"),
        RAPIDOCR,
        *TEXT_SOURCES,
    ),
    inputs=("bytes=1x2048",),
    batch=32,
)
