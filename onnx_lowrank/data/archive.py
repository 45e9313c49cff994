"""Arrays from .npz and .npy files; nothing is ever unpickled."""

from __future__ import annotations

import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.errors import InputError

Array = NDArray[np.generic]
_DAMAGES = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    MemoryError,
    RuntimeError,
    SyntaxError,  # this and the next: what numpy's parser of headers lets through
    tokenize.TokenError,
    TypeError,
    ValueError,
)


def load_npz(path: Path) -> dict[str, Array]:
    """All arrays of an .npz file by name.

    Raises:
        InputError: if it cannot be read.
    """
    if not path.is_file():
        raise InputError(f"{path}, which is no file", "an .npz file", "check the path")
    try:
        if not zipfile.is_zipfile(path):
            raise InputError(f"{path}, which is not in .npz format", "an .npz file", "write it with numpy.savez")
        with np.load(path, allow_pickle=False) as archive:
            return {name: _member(path, name, archive) for name in archive.files}
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}", "a readable .npz file", "check the file") from error
    except _DAMAGES as error:
        raise InputError(f"{path}, damaged: {error}", "an intact .npz file", "write it again") from error


def load_npy(path: Path) -> Array:
    """The array of an .npy file.

    Raises:
        InputError: if it cannot be read.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}", "a readable .npy file", "check the file") from error
    except _DAMAGES as error:
        if "allow_pickle" in str(error) or "pickled" in str(error):
            right = "a plain array in .npy format; nothing is unpickled"
            raise InputError(f"{path}, which holds something else", right, "write it with numpy.save") from error
        raise InputError(f"{path}, damaged: {error}", "an intact .npy file", "write it again") from error
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path}, which is an archive", "an .npy file", "name it .npz")
    return array


def _member(path: Path, name: str, archive: Mapping[str, object]) -> Array:
    try:
        array = archive[name]
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        right = "plain arrays; nothing is unpickled"
        raise InputError(
            f"pickled objects in array {name!r} of {path}", right, "save it with a numeric type"
        ) from error
    if not isinstance(array, np.ndarray):
        raise InputError(f"{name!r} in {path}, which is no array", "arrays only", "write the file with numpy.savez")
    return array
