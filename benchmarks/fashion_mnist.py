"""Fashion-MNIST as Debian's dataset-fashion-mnist installs it (copyright 2017 Zalando SE, MIT licence)."""

import gzip
from pathlib import Path

import numpy as np
import numpy.typing as npt

DATA = Path("/usr/share/datasets/fashion-mnist")

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


def load(split: str, folder: Path = DATA) -> tuple[Pixels, Labels]:
    """Images (n, 1, 28, 28) and labels (n,) of the split `train` or `t10k`, from gzipped idx files."""
    images = gzip.decompress((folder / f"{split}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{split}-labels-idx1-ubyte.gz").read_bytes())
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 1, 28, 28)
    return pixels, np.frombuffer(labels, np.uint8, offset=8).astype(np.int64)
