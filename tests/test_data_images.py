"""Samples from folders of images, against Pillow and the arithmetic stated."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto
from PIL import Image
from samples import IMAGE, RNG, fed, refusal, x

from onnx_lowrank.data import read_samples
from onnx_lowrank.signature import TensorSpec

PLAIN = "layout=nchw"


def picture(path: Path, height: int = 6, width: int = 8, mode: str = "RGB") -> np.ndarray:
    shape = (height, width) if mode == "L" else (height, width, 3)
    pixels = RNG.integers(0, 256, shape).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def test_images_as_stated(tmp_path: Path) -> None:
    pixels = [picture(tmp_path / f"{i}.png") for i in range(3)]
    data = read_samples(tmp_path, [IMAGE], preprocess="scale=255,mean=0.5")
    wanted = np.stack(pixels).transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255) - np.float32(0.5)
    np.testing.assert_allclose(np.concatenate(fed(data)), wanted, atol=1e-6)
    assert (data.origin, data.notes) == (str(tmp_path), (f"images of {tmp_path} become arrays by scale=255,mean=0.5",))
    assert data.sources is not None
    assert data.sources.tolist() == ["0.png", "1.png", "2.png"]


def test_what_is_stated_beside_them_unless_an_option_says_more(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 6, 8)
    (tmp_path / "preprocess.txt").write_text("crop=4\n")
    assert fed(read_samples(tmp_path, [IMAGE]))[0].shape == (1, 3, 4, 4)
    assert fed(read_samples(tmp_path, [IMAGE], preprocess="resize=3"))[0].shape == (1, 3, 3, 4)


def test_images_of_different_sizes_and_modes(tmp_path: Path) -> None:
    gray = picture(tmp_path / "a.png", 4, 5, "L")
    picture(tmp_path / "b.jpg", 6, 8)
    first, second = fed(read_samples(tmp_path, [IMAGE], preprocess=PLAIN))
    assert (first.shape, second.shape) == ((1, 3, 4, 5), (1, 3, 6, 8))
    assert np.array_equal(first[0], np.stack([gray] * 3).astype(np.float32))
    spec = TensorSpec("x", TensorProto.UINT8, ("N", "H", "W", 1))
    bytes_ = fed(read_samples(tmp_path, [spec], preprocess="channels=gray,layout=nhwc"))
    assert bytes_[0].dtype == np.uint8
    assert np.array_equal(bytes_[0][0, :, :, 0], gray)


def test_images_are_turned_upright(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 256, (4, 6, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(
        fed(read_samples(tmp_path, [IMAGE], preprocess=PLAIN))[0][0], np.rot90(pixels, -1).transpose(2, 0, 1)
    )


def test_resizing_is_pillows_bilinear(tmp_path: Path) -> None:
    pixels = picture(tmp_path / "a.png", 20, 30)
    wanted = np.asarray(Image.fromarray(pixels).resize((15, 10), Image.Resampling.BILINEAR))
    assert np.array_equal(fed(read_samples(tmp_path, [IMAGE], preprocess="resize=10"))[0][0], wanted.transpose(2, 0, 1))


def test_images_that_are_refused(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    path = tmp_path / "a.png"
    assert refusal(tmp_path) == (
        f"images in {tmp_path}; expected how they become arrays, in preprocess.txt beside them or as --preprocess; "
        "write for example resize=256,crop=224,scale=255"
    )
    assert refusal(tmp_path, preprocess="crop=7") == (
        f"{path}, an image of 6x8; expected at least 7x7 to crop; resize it first"
    )
    assert refusal(tmp_path, preprocess="channels=gray") == (
        f"array 'x' in {path} of shape 1x1x6x8; expected samples of input 'x' float Nx3xHxW; resize or reshape it"
    )
    np.save(tmp_path / "b.npy", x(3, 6, 8))
    assert refusal(tmp_path, preprocess=PLAIN) == (
        f"1 files of arrays beside 1 images in {tmp_path}; expected one kind of samples; separate them"
    )
    (tmp_path / "b.npy").unlink()
    (tmp_path / "preprocess.txt").write_text("grey=1")
    assert refusal(tmp_path).startswith(f"{tmp_path / 'preprocess.txt'} with 'grey=1'; expected name=value of ")
    path.write_bytes(path.read_bytes()[:60])
    assert refusal(tmp_path, preprocess=PLAIN).startswith(f"{path}, which cannot be read (")


def test_images_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert refusal(tmp_path, preprocess=PLAIN) == (
        f"{tmp_path / 'a.png'}, while Pillow is not installed; expected Pillow to read images; "
        "pip install onnx-lowrank[images]"
    )
