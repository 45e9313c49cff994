"""Photographs that ship inside the wheels of scikit-image and scikit-learn, and crops of them.

No photograph of the calibration split appears in the evaluation split.
"""

from importlib.resources import files
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Split = Literal["calibration", "evaluation"]

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
}


def photographs(split: Split) -> list[Image.Image]:
    """The photographs of a split, RGB."""
    images: list[Image.Image] = []
    for package, name in _FILES[split]:
        with (files(package) / name).open("rb") as file:
            images.append(Image.open(file).convert("RGB"))
    return images


def crops(split: Split, size: int, samples: int, seed: int = 0) -> NDArray[np.uint8]:
    """Random square crops, each covering 40-100 % of the shorter side, half of them mirrored.

    Returns:
        RGB array (samples, size, size, 3).
    """
    rng = np.random.default_rng(seed)
    images = photographs(split)
    result = np.empty((samples, size, size, 3), np.uint8)
    for index in range(samples):
        image = images[index % len(images)]
        side = int(min(image.size) * rng.uniform(0.4, 1.0))
        left, top = (int(rng.integers(0, extent - side + 1)) for extent in image.size)
        crop = image.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
        if rng.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        result[index] = np.asarray(crop)
    return result
