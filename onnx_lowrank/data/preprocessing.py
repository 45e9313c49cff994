"""How an image becomes an array, in words: `resize=256,crop=224,scale=255,mean=0.5,std=0.25,layout=nchw,channels=rgb`.

What is not named is not done. In this order:

* resize=256: the shorter side, bilinear; resize=480x640: height x width;
* crop=224 or crop=HxW: the centre;
* channels=rgb (default), bgr or gray;
* scale=255: pixels, 0 to 255, are divided by it;
* mean=0.485:0.456:0.406 and std=...: one number, or one per channel, subtracted and divided by;
* layout=nchw (default) or nhwc.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.errors import InputError

Size = tuple[int, int]
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Preprocessing:
    """See the module.

    Args:
        text: The words it was read from.
        resize: Length of the shorter side, or (height, width).
        crop: (height, width).
        channels: rgb, bgr or gray.
        scale: What pixels are divided by.
        mean: Subtracted, per channel.
        std: Divided by, per channel.
        layout: nchw or nhwc.
    """

    text: str
    resize: int | Size | None = None
    crop: Size | None = None
    channels: str = "rgb"
    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layout: str = "nchw"

    def size(self, height: int, width: int) -> Size:
        """Height and width of an image after resizing."""
        if self.resize is None:
            return height, width
        if isinstance(self.resize, tuple):
            return self.resize
        shorter = min(height, width)
        return round(height * self.resize / shorter), round(width * self.resize / shorter)

    def array(self, pixels: Pixels) -> NDArray[np.generic]:
        """(height, width, channels) in RGB or gray, resized, to what the model is fed, without the batch axis.

        float32; still uint8 if nothing was asked for that makes fractions.

        Raises:
            InputError: if the image is smaller than the crop.
        """
        if self.crop is not None:
            pixels = _centre(pixels, self.crop)
        if self.channels == "bgr":
            pixels = pixels[:, :, ::-1]
        array: NDArray[np.generic] = pixels
        if (self.scale, self.mean, self.std) != (1.0, (0.0,), (1.0,)):
            mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
            array = (pixels.astype(np.float32) / np.float32(self.scale) - mean) / std
        return np.ascontiguousarray(array.transpose(2, 0, 1) if self.layout == "nchw" else array)

    def __str__(self) -> str:
        return self.text


def parse_preprocess(text: str, where: str = "--preprocess") -> Preprocessing:
    """Read the words.

    Args:
        text: As in the module's first line.
        where: Named in errors.

    Raises:
        InputError: naming the step that cannot be read.
    """
    steps: dict[str, object] = {}
    for step in (step.strip() for step in text.split(",")):
        name, _, value = step.partition("=")
        if name not in _STEPS:
            raise InputError(f"{where} with {step!r}", f"name=value of {', '.join(_STEPS)}", "correct it")
        if name in steps:
            raise InputError(f"{where} with {name} twice", "each step once", "leave one of them")
        parse, right = _STEPS[name]
        try:
            steps[name] = parse(value)
        except ValueError as error:
            raise InputError(f"{where} with {step!r}", right, "correct it") from error
    made = Preprocessing(text, **steps)  # pyright: ignore[reportArgumentType] - each parser gives its field's type
    count = 1 if made.channels == "gray" else 3
    for name, values in (("mean", made.mean), ("std", made.std)):
        if len(values) not in {1, count}:
            found = f"{where} with {len(values)} values of {name} for {count} channels"
            raise InputError(found, "one, or one per channel", "correct it")
    return made


def _centre(pixels: Pixels, crop: Size) -> Pixels:
    height, width = pixels.shape[:2]
    top, left = (height - crop[0]) // 2, (width - crop[1]) // 2
    if min(top, left) < 0:
        wanted = "x".join(map(str, crop))
        raise InputError(f"an image of {height}x{width}", f"at least {wanted} to crop", "resize it first")
    return pixels[top : top + crop[0], left : left + crop[1]]


def _positive(text: str) -> int:
    if not text.isascii() or int(text) < 1:
        raise ValueError(text)
    return int(text)


def _pair(text: str) -> Size:
    height, width = map(_positive, text.split("x"))
    return height, width


def _resize(text: str) -> int | Size:
    return _pair(text) if "x" in text else _positive(text)


def _crop(text: str) -> Size:
    return _pair(text if "x" in text else f"{text}x{text}")


def _numbers(text: str) -> tuple[float, ...]:
    numbers = tuple(map(float, text.split(":")))
    if not all(map(math.isfinite, numbers)):
        raise ValueError(text)
    return numbers


def _divisors(text: str) -> tuple[float, ...]:
    if 0 in _numbers(text):
        raise ValueError(text)
    return _numbers(text)


def _divisor(text: str) -> float:
    (number,) = _divisors(text)
    return number


def _one_of(*words: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(text)
        return text

    return parse


_STEPS: dict[str, tuple[Callable[[str], object], str]] = {
    "resize": (_resize, "a number of pixels, or HEIGHTxWIDTH"),
    "crop": (_crop, "a number of pixels, or HEIGHTxWIDTH"),
    "channels": (_one_of("rgb", "bgr", "gray"), "rgb, bgr or gray"),
    "scale": (_divisor, "a number other than 0"),
    "mean": (_numbers, "numbers joined by :"),
    "std": (_divisors, "numbers other than 0, joined by :"),
    "layout": (_one_of("nchw", "nhwc"), "nchw or nhwc"),
}
