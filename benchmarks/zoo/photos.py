"""Photographs that ship inside the wheels of scikit-image, scikit-learn and foolbox, and crops of them.

No photograph of one split of scikit-image's and scikit-learn's appears in another. foolbox holds 20 labelled samples of
ImageNet.
"""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.zoo.source import Wheel

FOOLBOX = Wheel("foolbox", "3.3.4", "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb")

Split = Literal["calibration", "evaluation", "further"]

_FILES: dict[Split, tuple[tuple[str, str], ...]] = {
    "calibration": (
        ("skimage.data", "chelsea.png"),
        ("skimage.data", "rocket.jpg"),
        ("skimage.data", "motorcycle_left.png"),
        ("skimage.data", "coins.png"),
        ("skimage.data", "brick.png"),
        ("sklearn.datasets.images", "flower.jpg"),
    ),
    "evaluation": (
        ("skimage.data", "astronaut.png"),
        ("skimage.data", "coffee.png"),
        ("skimage.data", "camera.png"),
        ("skimage.data", "gravel.png"),
        ("sklearn.datasets.images", "china.jpg"),
    ),
    "further": (
        ("skimage.data", "clock_motion.png"),
        ("skimage.data", "grass.png"),
        ("skimage.data", "hubble_deep_field.jpg"),
        ("skimage.data", "moon.png"),
        ("skimage.data", "retina.jpg"),
        ("skimage.data", "ihc.png"),
        ("skimage.data", "cell.png"),
    ),
}


class Crops(NamedTuple):
    """Square crops, RGB (samples, size, size, 3), and the index (samples,) of the photograph each was cut from."""

    pixels: NDArray[np.uint8]
    source: NDArray[np.int64]


def photographs(split: Split) -> list[Image.Image]:
    """The photographs of a split, RGB."""
    images: list[Image.Image] = []
    for package, name in _FILES[split]:
        with (files(package) / name).open("rb") as file:
            images.append(Image.open(file).convert("RGB"))
    return images


def imagenet(foolbox: Path) -> tuple[list[Image.Image], list[int]]:
    """The samples of ImageNet in foolbox, RGB, and their classes, given the unpacked wheel."""
    paths = sorted((foolbox / "foolbox" / "data").glob("imagenet_*"))
    return [Image.open(path).convert("RGB") for path in paths], [int(path.stem.split("_")[-1]) for path in paths]


def crops(images: Sequence[Image.Image], size: int, samples: int, *, smallest: float = 0.4, seed: int = 0) -> Crops:
    """Random square crops of the photographs in turn, half of them mirrored. Fewer samples are a part of more.

    Args:
        images: The photographs.
        size: Side of a crop after scaling.
        samples: How many.
        smallest: A crop covers this share to all of the shorter side.
        seed: Of the random choice.
    """
    rng = np.random.default_rng(seed)
    pixels = np.empty((samples, size, size, 3), np.uint8)
    for index in range(samples):
        image = images[index % len(images)]
        side = int(min(image.size) * rng.uniform(smallest, 1.0))
        left, top = (int(rng.integers(0, extent - side + 1)) for extent in image.size)
        crop = image.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
        if rng.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels[index] = np.asarray(crop)
    return Crops(pixels, np.arange(samples) % len(images))
