"""Where the zoo keeps things: `<cache>/<model>/{model.onnx,calibration.npz,evaluation.npz}` and `<cache>/sources`."""

import hashlib
import os
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from platformdirs import user_cache_path

Arrays = Mapping[str, NDArray[Any]]

CACHE_VARIABLE = "ONNX_LOWRANK_ZOO"


def default_cache() -> Path:
    """The folder named by ONNX_LOWRANK_ZOO, else `onnx-lowrank/zoo` in the user's cache folder."""
    override = os.environ.get(CACHE_VARIABLE)
    return Path(override).expanduser() if override else user_cache_path("onnx-lowrank") / "zoo"


def sha256(path: Path) -> str:
    """The hex digest of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def appearing_whole(path: Path) -> Generator[Path, None, None]:
    """Yield a sibling path to write to; it becomes `path` when the block succeeds and vanishes when it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".partial-") as folder:
        partial = Path(folder) / path.name
        yield partial
        partial.replace(path)


def save_arrays(path: Path, arrays: Arrays) -> None:
    """Write an .npz file, arrays named like graph inputs, leading axis = samples."""
    with appearing_whole(path) as partial:
        np.savez(partial, **dict(arrays))  # pyright: ignore[reportArgumentType]  # its own keywords are typed


def load_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Read an .npz file; never unpickles."""
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}
