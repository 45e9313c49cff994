"""Samples from a folder of .npy and .npz files, of any shapes, or of images; each file is a source of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from onnx_lowrank.data.archive import load_npy, load_npz
from onnx_lowrank.data.dataset import Dataset, Part
from onnx_lowrank.data.fitting import Arrays, Signature, fitted, gathered
from onnx_lowrank.data.images import IMAGE_SUFFIXES, read_image
from onnx_lowrank.data.preprocessing import Preprocessing, parse_preprocess
from onnx_lowrank.errors import InputError

PREPROCESS_FILE = "preprocess.txt"
_ARRAY_SUFFIXES = {".npy", ".npz"}


def read_folder(folder: Path, signature: Signature, preprocess: str | None, limit: int | None) -> Dataset:
    """Samples of a folder and the folders in it, in the order of their paths; other files are not looked at.

    Args:
        folder: The folder.
        signature: The inputs.
        preprocess: How images become arrays; None: as the folder's preprocess.txt says.
        limit: Number of samples to use at most, or None for all.

    Raises:
        InputError: if it holds no samples, arrays beside images, or something that does not fit.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    arrays = [path for path in files if path.suffix.lower() in _ARRAY_SUFFIXES]
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if arrays and images:
        found = f"{len(arrays)} files of arrays beside {len(images)} images in {folder}"
        raise InputError(found, "one kind of samples", "separate them")
    if not (arrays or images):
        raise InputError(f"no samples in {folder}", ".npy, .npz or image files", "check the path")
    usable = arrays or images
    chosen = _spaced(usable, limit)
    notes: list[str] = []
    if images:
        how = _preprocessing(folder, preprocess)
        notes.append(f"images of {folder} become arrays by {how}")
        found = [(str(path), _sourced(_image(path, how, signature), path, folder)) for path in chosen]
    else:
        found = [(str(path), _sourced(_arrays(path, signature), path, folder)) for path in chosen]
    if len(chosen) < len(usable):
        notes.append(f"{len(chosen)} of {len(usable)} files are used, evenly spaced; --samples sets how many")
    data = gathered(str(folder), found, signature).thinned(limit).in_whole_batches()
    return replace(data, notes=(*notes, *data.notes))


def _spaced(files: Sequence[Path], limit: int | None) -> list[Path]:
    if limit is None or len(files) <= limit:
        return list(files)
    return [files[index] for index in np.linspace(0, len(files) - 1, limit).round().astype(int)]


def _preprocessing(folder: Path, text: str | None) -> Preprocessing:
    file = folder / PREPROCESS_FILE
    if text is not None:
        return parse_preprocess(text, "--preprocess")
    if not file.is_file():
        right = f"how they become arrays, in {PREPROCESS_FILE} beside them or as --preprocess"
        raise InputError(f"images in {folder}", right, "write for example resize=256,crop=224,scale=255")
    return parse_preprocess(file.read_text(encoding="utf-8", errors="replace").strip(), str(file))


def _image(path: Path, how: Preprocessing, signature: Signature) -> Part:
    name = _only_input(path, signature)
    return fitted(str(path), {name: read_image(path, how)[None]}, signature)


def _arrays(path: Path, signature: Signature) -> Part:
    """Samples of one file: a stack, or a single one, whose arrays all lack an axis for samples."""
    arrays: Arrays
    arrays = load_npz(path) if path.suffix.lower() == ".npz" else {_only_input(path, signature): load_npy(path)}
    ranks = {spec.name: len(spec.shape) for spec in signature}
    single = all(name not in ranks or array.ndim == ranks[name] - 1 for name, array in arrays.items())
    return fitted(str(path), {name: array[None] for name, array in arrays.items()} if single else arrays, signature)


def _only_input(path: Path, signature: Signature) -> str:
    if len(signature) == 1:
        return signature[0].name
    names = ", ".join(repr(spec.name) for spec in signature)
    raise InputError(f"{path} for the inputs {names}", "a name for each array", "write .npz files")


def _sourced(part: Part, path: Path, folder: Path) -> Part:
    if part.sources is not None:
        return part
    return replace(part, sources=np.full(len(part), path.relative_to(folder).as_posix()))
