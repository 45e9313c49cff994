"""Images to arrays: the grammar, and the arithmetic against its definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_lowrank.data.preprocessing import Preprocessing, parse_preprocess
from onnx_lowrank.errors import InputError

RNG = np.random.default_rng(0)


def pixels(height: int = 5, width: int = 7, channels: int = 3) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, channels)).astype(np.uint8)


def test_every_step_is_read() -> None:
    text = "resize=4x6, crop=3,channels=bgr,scale=255,mean=0.1:0.2:0.3,std=0.5,layout=nhwc"
    assert parse_preprocess(text) == Preprocessing(text, (4, 6), (3, 3), "bgr", 255.0, (0.1, 0.2, 0.3), (0.5,), "nhwc")
    assert str(parse_preprocess("crop=3x4")) == "crop=3x4"


STEPS = "resize, crop, channels, scale, mean, std, layout"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", f"--preprocess with ''; expected name=value of {STEPS}; correct it"),
        ("blur=3", f"--preprocess with 'blur=3'; expected name=value of {STEPS}; correct it"),
        ("crop=3,", f"--preprocess with ''; expected name=value of {STEPS}; correct it"),
        ("resize=0", "--preprocess with 'resize=0'; expected a number of pixels, or HEIGHTxWIDTH; correct it"),
        ("crop=3x4x5", "--preprocess with 'crop=3x4x5'; expected a number of pixels, or HEIGHTxWIDTH; correct it"),
        ("crop", "--preprocess with 'crop'; expected a number of pixels, or HEIGHTxWIDTH; correct it"),
        ("scale=0", "--preprocess with 'scale=0'; expected a number other than 0; correct it"),
        ("scale=1:2", "--preprocess with 'scale=1:2'; expected a number other than 0; correct it"),
        ("mean=1,mean=2", "--preprocess with mean twice; expected each step once; leave one of them"),
        ("mean=nan", "--preprocess with 'mean=nan'; expected numbers joined by :; correct it"),
        ("std=1:0:1", "--preprocess with 'std=1:0:1'; expected numbers other than 0, joined by :; correct it"),
        ("std=1:2", "--preprocess with 2 values of std for 3 channels; expected one, or one per channel; correct it"),
        ("layout=chw", "--preprocess with 'layout=chw'; expected nchw or nhwc; correct it"),
        ("channels=cmyk", "--preprocess with 'channels=cmyk'; expected rgb, bgr or gray; correct it"),
    ],
)
def test_what_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_preprocess(text)
    assert str(caught.value) == f"got {message}"


def test_the_arithmetic() -> None:
    image = pixels()
    made = parse_preprocess("scale=255,mean=0.4:0.5:0.6,std=0.1:0.2:0.3").array(image)
    wanted = (image / 255.0 - np.array([0.4, 0.5, 0.6])) / np.array([0.1, 0.2, 0.3])
    assert made.dtype == np.float32
    assert np.allclose(made.astype(float), wanted.transpose(2, 0, 1), rtol=1e-5, atol=1e-5)


def test_means_are_those_of_the_channels_in_their_new_order() -> None:
    image = pixels()
    made = parse_preprocess("channels=bgr,mean=1:2:3,layout=nhwc").array(image)
    assert np.array_equal(made, image[:, :, ::-1] - np.array([1, 2, 3], np.float32))


def test_pixels_stay_bytes_where_nothing_makes_fractions() -> None:
    image = pixels()
    made = parse_preprocess("crop=3x5,layout=nhwc").array(image)
    assert made.dtype == np.uint8
    np.testing.assert_array_equal(made, image[1:4, 1:6])


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 300))
def test_resizing_keeps_the_aspect_and_makes_the_shorter_side(height: int, width: int, side: int) -> None:
    new = Preprocessing("", resize=side).size(height, width)
    assert min(new) == side
    assert abs(new[0] * width / (height * side) - new[1] * height / (width * side)) <= max(height, width)
    assert Preprocessing("", resize=(3, 4)).size(height, width) == (3, 4)


def test_a_crop_larger_than_the_image() -> None:
    with pytest.raises(InputError, match="got an image of 5x7; expected at least 6x6 to crop; resize it first"):
        parse_preprocess("crop=6").array(pixels())
