"""Weights in files beside the model: where a reference may point, and reading it through a memory map.

A reference comes from a file somebody sent, so it is checked before anything is opened: the location must be relative,
stay inside the model's folder after symbolic links are followed, and the bytes it names must exist.
https://onnx.ai/onnx/repo-docs/ExternalData.html
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from onnx_lowrank.errors import InputError
from onnx_lowrank.graph.tensor import PACKED_BITS, tensor_bytes


@dataclass(frozen=True)
class Region:
    """`length` bytes at `offset` of `file`."""

    file: Path
    offset: int
    length: int

    def map(self) -> NDArray[np.uint8]:
        """The bytes as a read-only memory map of shape (length,)."""
        if self.length == 0:
            return np.empty(0, np.uint8)
        return np.memmap(self.file, np.uint8, "r", self.offset, (self.length,))


def is_external(tensor: TensorProto) -> bool:
    """Whether the tensor's data lives in a file beside the model."""
    return tensor.data_location == TensorProto.EXTERNAL


def region(tensor: TensorProto, folder: Path | None) -> Region:
    """Where an external tensor's data lies.

    Raises:
        InputError: if the reference is malformed, leaves `folder`, names no file, or more bytes than there are.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    label = f"tensor {tensor.name!r}"
    try:
        offset, needed = int(entries.get("offset", "0") or "0"), tensor_bytes(tensor)
        length = int(entries.get("length", "") or needed)
    except (ValueError, KeyError) as error:
        got = f"{label} with external data {entries} and element type {tensor.data_type}"
        raise InputError(got, "a numeric offset and length and a known type", "export the model again") from error
    if offset < 0 or length != needed or needed < 0:
        got = f"{label} with {length} external bytes at offset {offset}"
        expected = f"{needed} bytes for shape {list(tensor.dims)}"
        raise InputError(got, expected, "export the model again")
    file = _inside(entries.get("location", ""), folder, label)
    size = file.stat().st_size
    if offset + length > size:
        got = f"{file} of {size} bytes, too short for {label}"
        raise InputError(got, f"at least {offset + length} bytes", "copy the file again, completely")
    return Region(file, offset, length)


def read_tensor(tensor: TensorProto, folder: Path | None) -> NDArray[np.generic]:
    """Value of a tensor message. External data comes as a read-only memory map wherever its type allows.

    Args:
        tensor: Any tensor but a segment.
        folder: Where relative locations start; None if the model has no file.

    Raises:
        InputError: if an external reference cannot be followed (see `region`) or the data do not fit the shape.
    """
    if is_external(tensor):
        raw = region(tensor, folder).map()
        if tensor.data_type in PACKED_BITS:
            return numpy_helper.to_array(with_raw_data(tensor, raw.tobytes()))
        return raw.view(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).reshape(tuple(tensor.dims))
    try:
        return numpy_helper.to_array(tensor)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        got = f"tensor {tensor.name!r} whose data cannot be read ({error})"
        raise InputError(got, f"data for shape {list(tensor.dims)}", "export the model again") from error


def raw_bytes(tensor: TensorProto, folder: Path | None) -> NDArray[np.uint8]:
    """The tensor's data as raw bytes, little endian, packed; a memory map for external data."""
    if is_external(tensor):
        return region(tensor, folder).map()
    data = tensor.raw_data
    if not data:
        data = numpy_helper.from_array(read_tensor(tensor, folder)).raw_data
    return np.frombuffer(data, np.uint8)


def with_raw_data(tensor: TensorProto, data: bytes) -> TensorProto:
    """A copy of `tensor` that holds `data` itself: name, type, shape, doc string and metadata stay."""
    copy = TensorProto()
    copy.CopyFrom(tensor)
    for name in ("external_data", "data_location"):
        copy.ClearField(name)
    copy.raw_data = data
    return copy


def _inside(location: str, folder: Path | None, label: str) -> Path:
    """The file `location` names, if it is a file inside `folder`."""
    if folder is None:
        got = f"{label} with external data in a model that has no folder"
        raise InputError(got, "a model read from a file", "load it from its path")
    try:
        file = (folder / location).resolve()
        inside = file.is_relative_to(folder.resolve()) and not Path(location).is_absolute()
        found = file.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        got = f"{label} with external data in {location!r} ({error})"
        raise InputError(got, "a file name", "export the model again") from error
    if not location or not inside or ".." in Path(location).parts:
        got = f"{label} with external data in {location!r}, outside the model's folder"
        raise InputError(got, "a path inside that folder", "put a copy of the file beside the model")
    if not found:
        got = f"{label} with external data in {location!r}, which is not in {folder}"
        raise InputError(got, "the file beside the model", "copy it there")
    if not os.access(file, os.R_OK):
        raise InputError(f"{file}, which cannot be read", "a readable file", "check its permissions")
    return file
