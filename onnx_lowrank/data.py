"""Samples for a model from an .npz file: arrays named like the inputs, leading axis = samples, labels under `label`."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from onnx_lowrank.errors import InputError
from onnx_lowrank.signature import Feeds, TensorSpec

LABEL = "label"


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples for every input of a model.

    An array has the rank of its input, the leading axis being the batch; or one axis more, and then each entry is fed
    whole (inputs without a batch axis). The number of samples is a multiple of the batch the model takes.

    Args:
        arrays: Input name -> (samples, ...), in the input's element type.
        labels: (samples, ...), or None.
        whole: Inputs whose entries are fed whole.
        batch: The batch size the signature fixes, or None where any will do.
        notes: What the user should know, e.g. that samples were dropped.
    """

    arrays: dict[str, NDArray[np.generic]]
    labels: NDArray[np.generic] | None
    whole: frozenset[str]
    batch: int | None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def feeds(self, batch: int = 1, indices: slice | Sequence[int] | NDArray[np.intp] = slice(None)) -> Iterator[Feeds]:
        """The chosen samples, `batch` at a time.

        A batch size fixed by the model wins; then an incomplete tail of `indices` is not fed.
        """
        order = np.arange(len(self))[indices]
        size = self.batch or batch
        stop = len(order) - len(order) % size if self.batch else len(order)
        for start in range(0, stop, size):
            rows = order[start : start + size]
            yield {name: array[rows[0] if name in self.whole else rows] for name, array in self.arrays.items()}

    def take(self, indices: slice | Sequence[int] | NDArray[np.intp]) -> Dataset:
        """The chosen samples with their labels."""
        arrays = {name: array[indices] for name, array in self.arrays.items()}
        return replace(self, arrays=arrays, labels=None if self.labels is None else self.labels[indices])

    def split(self, held_out_fraction: float, seed: int) -> tuple[Dataset, Dataset]:
        """Two disjoint parts drawn at random: the rest and the held-out part, both whole batches and not empty.

        Raises:
            InputError: if there are not samples enough for two parts.
        """
        size = self.batch or 1
        count = len(self) // size
        if count < 2:
            raise InputError(f"{len(self)} samples", f"at least {2 * size} to hold some out", "give more samples")
        held = min(max(round(count * held_out_fraction), 1), count - 1) * size
        order = np.random.default_rng(seed).permutation(len(self))
        return self.take(np.sort(order[held:])), self.take(np.sort(order[:held]))

    @cached_property
    def sha256(self) -> str:
        """Hash of names, types, shapes and values, independent of how the file was packed."""
        digest = hashlib.sha256()
        entries: dict[str, NDArray[np.generic]] = dict(sorted(self.arrays.items()))
        if self.labels is not None:
            entries[LABEL] = self.labels
        for name, array in entries.items():
            digest.update(f"{name}:{array.dtype}:{array.shape};".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def read_npz(path: Path, signature: Sequence[TensorSpec]) -> Dataset:
    """Read samples for the inputs of `signature`; nothing is ever unpickled.

    Raises:
        InputError: if the file or an array in it does not fit.
    """
    arrays = _load(path)
    names = [spec.name for spec in signature]
    missing, unknown = [n for n in names if n not in arrays], [n for n in arrays if n not in (*names, LABEL)]
    if missing:
        raise InputError(
            f"no array {_listed(missing)} in {path}", f"one per input: {_listed(names)}", "add the missing"
        )
    if unknown:
        right = f"the inputs {_listed(names)} and optionally {LABEL!r}"
        raise InputError(f"unknown arrays {_listed(unknown)} in {path}", right, "rename or remove them")
    labels = None if LABEL in names else arrays.pop(LABEL, None)
    cast = {spec.name: _fitted(path, spec, arrays[spec.name]) for spec in signature}
    if labels is not None:
        _refuse_non_finite(path, LABEL, labels)
    _check_counts(path, cast if labels is None else {**cast, LABEL: labels})
    whole = frozenset(spec.name for spec in signature if cast[spec.name].ndim > len(spec.shape))
    return _batched(path, Dataset(cast, labels, whole, _fixed_batch(path, signature, whole)))


def _load(path: Path) -> dict[str, NDArray[np.generic]]:
    if not path.is_file():
        raise InputError(f"{path}, which is no file", "an .npz file", "check the path")
    try:
        if not zipfile.is_zipfile(path):
            raise InputError(f"{path}, which is not in .npz format", "an .npz file", "write it with numpy.savez")
        with np.load(path, allow_pickle=False) as archive:
            return {name: _array(path, name, archive) for name in archive.files}
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}", "a readable .npz file", "check the file") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, MemoryError, RuntimeError, ValueError) as error:
        raise InputError(f"{path}, damaged: {error}", "an intact .npz file", "write it again") from error


def _array(path: Path, name: str, archive: Mapping[str, object]) -> NDArray[np.generic]:
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


def _fitted(path: Path, spec: TensorSpec, array: NDArray[np.generic]) -> NDArray[np.generic]:
    """The array in the input's type, if its type, rank, shape and values fit."""
    where = f"array {spec.name!r} in {path}"
    rank = len(spec.shape)
    if array.ndim not in {rank, rank + 1} or array.ndim == 0:
        right = f"{rank or 1} axes like input {spec}, samples first" if rank else "one value per sample"
        raise InputError(f"{where} with {array.ndim} axes", right, "reshape it")
    tail = spec.shape if array.ndim > rank else spec.shape[1:]
    if any(isinstance(dim, int) and dim != size for dim, size in zip(tail, array.shape[1:], strict=True)):
        shape = "x".join(map(str, array.shape))
        raise InputError(f"{where} of shape {shape}", f"samples of input {spec}", "resize or reshape it")
    cast = _cast(spec, array)
    if cast is None:
        wanted = TensorProto.DataType.Name(spec.elem_type).lower()
        raise InputError(f"{where} of type {array.dtype}", f"{wanted}, or integers that convert exactly", "convert it")
    _refuse_non_finite(path, spec.name, array)
    return cast


def _cast(spec: TensorSpec, array: NDArray[np.generic]) -> NDArray[np.generic] | None:
    """The array in the input's type if no value changes, else None; bfloat16 is rounded to, as no .npz can hold it."""
    if spec.elem_type == TensorProto.STRING:
        return array.astype(object) if array.dtype.kind in "US" else None
    wanted = spec.dtype
    if array.dtype.kind not in "fiub" or spec.elem_type == TensorProto.UNDEFINED:
        return None
    if spec.is_floating and wanted.kind != "f":
        return array.astype(wanted)
    if np.can_cast(array.dtype, wanted, "safe"):
        return array.astype(wanted, copy=False)
    if array.dtype.kind == "f" or wanted.kind == "b":
        return None
    cast = array.astype(wanted)
    return cast if np.array_equal(cast.astype(array.dtype), array) else None


def _refuse_non_finite(path: Path, name: str, array: NDArray[np.generic]) -> None:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        count = int(np.count_nonzero(~np.isfinite(array)))
        raise InputError(
            f"{count} NaN or infinite values in array {name!r} of {path}", "finite values", "clean the data"
        )


def _check_counts(path: Path, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    counts = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name}: {count}" for name, count in counts.items())
        raise InputError(f"different numbers of samples in {path} ({listed})", "the same number", "align the arrays")
    if 0 in counts.values():
        raise InputError(f"no samples in {path}", "at least one", "add samples")


def _fixed_batch(path: Path, signature: Sequence[TensorSpec], whole: frozenset[str]) -> int | None:
    fixed = {
        spec.name: spec.shape[0] for spec in signature if spec.name not in whole and isinstance(spec.shape[0], int)
    }
    sizes = set(fixed.values()) | ({1} if whole else set())
    if len(sizes) > 1:
        listed = ", ".join(f"{name}: {size}" for name, size in fixed.items())
        right = "one batch size"
        raise InputError(
            f"inputs with different leading dimensions ({listed}) in {path}",
            right,
            "give each array one more axis, samples first",
        )
    return next(iter(sizes), None)


def _batched(path: Path, data: Dataset) -> Dataset:
    size, count = data.batch or 1, len(data)
    if size == 0 or count < size:
        raise InputError(f"{count} samples in {path}", f"at least {size}, the batch the model fixes", "add samples")
    if count % size == 0:
        return data
    note = f"the last {count % size} of {count} samples are not used: the model takes {size} at a time"
    return replace(data.take(slice(count - count % size)), notes=(note,))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)
