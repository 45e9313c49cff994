"""What the tests of samples share: a signature, arrays, and how a refusal reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto

from onnx_lowrank.data import Dataset, read_samples
from onnx_lowrank.errors import InputError
from onnx_lowrank.signature import TensorSpec

RNG = np.random.default_rng(0)
IMAGE = TensorSpec("x", TensorProto.FLOAT, ("N", 3, "H", "W"))
TEXT = (TensorSpec("ids", TensorProto.INT64, ("N", "T")), TensorSpec("mask", TensorProto.INT64, ("N", "T")))


def x(*shape: int) -> np.ndarray:
    """Random values."""
    return RNG.standard_normal(shape).astype(np.float32)


def fed(data: Dataset, name: str = "x") -> list[np.ndarray]:
    """What one input gets, a sample at a time."""
    return [np.asarray(feeds[name]) for feeds in data.feeds(1)]


def refusal(spec: Path | str, signature: tuple[TensorSpec, ...] = (IMAGE,), preprocess: str | None = None) -> str:
    """The message without "got "."""
    with pytest.raises(InputError) as caught:
        read_samples(spec, signature, preprocess=preprocess)
    return str(caught.value).removeprefix("got ")
