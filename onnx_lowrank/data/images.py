"""Images through Pillow, which is optional: pip install onnx-lowrank[images]."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.data.preprocessing import Preprocessing
from onnx_lowrank.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})


def read_image(path: Path, how: Preprocessing) -> NDArray[np.generic]:
    """The image upright, as the user's camera held it, preprocessed; of an animation the first frame.

    Raises:
        InputError: without Pillow, or if the file cannot be read or is too small.
    """
    try:
        from PIL import Image, ImageOps  # noqa: PLC0415 - optional
    except ImportError as error:
        found = f"{path}, while Pillow is not installed"
        raise InputError(found, "Pillow to read images", "pip install onnx-lowrank[images]") from error
    try:
        with Image.open(path) as opened:
            upright = ImageOps.exif_transpose(opened).convert("L" if how.channels == "gray" else "RGB")
        pixels = np.asarray(_resized(upright, how))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}, which cannot be read ({error})", "an image", "check the file") from error
    try:
        return how.array(pixels if pixels.ndim == 3 else pixels[:, :, None])
    except InputError as error:
        raise InputError(f"{path}, {error.got}", error.expected, error.do) from error


def _resized(image: Image.Image, how: Preprocessing) -> Image.Image:
    from PIL import Image  # noqa: PLC0415 - optional

    height, width = how.size(image.height, image.width)
    if (height, width) == (image.height, image.width):
        return image
    return image.resize((width, height), Image.Resampling.BILINEAR)
