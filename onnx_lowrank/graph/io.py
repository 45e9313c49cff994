"""Reading and writing ONNX files. What is written appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
from collections.abc import Generator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto, StringStringEntryProto, TensorProto
from onnx.checker import ValidationError

from onnx_lowrank.errors import InputError
from onnx_lowrank.graph.check import first_line, inference_errors, skeleton, structure_error
from onnx_lowrank.graph.external import is_external, raw_bytes, region, with_raw_data
from onnx_lowrank.graph.messages import not_text, tensors, unknown_type
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.graph.tensor import tensor_bytes

OLDEST_OPSET = 7
SMALLEST_EXTERNAL = 1024
INLINE_LIMIT = 1_800_000_000  # protobuf ends at 2**31 - 1; the rest of the graph needs room too
PROTOBUF_LIMIT = 2**31 - 1
PAGE = 4096
CHUNK = 1 << 24


def load(path: Path) -> Graph:
    """Read and check a model. Weights in external files stay there; that they can be read is checked now.

    Raises:
        InputError: if `path` is no readable, valid ONNX model of opset 7 or newer with all of its external data.
    """
    model = _parse(path)
    if not model.HasField("graph"):
        raise InputError(f"{path}, which holds no graph", "an ONNX model", "check which file this is")
    place = not_text(model)
    if place is not None:
        raise InputError(f"{path} with text that is not UTF-8 in {place}", "UTF-8", "export the model again")
    kind = unknown_type(model)
    if kind is not None:
        got = f"{path} with a value of element type {kind}"
        raise InputError(got, "a type this onnx release knows", "update onnx or export the model again")
    graph = Graph(model, path.parent)
    if graph.opset < OLDEST_OPSET:
        got = f"{path} with operator set {graph.opset}"
        raise InputError(got, f"{OLDEST_OPSET} or newer", "convert it with onnx.version_converter")
    for tensor in tensors(model):
        _validate(tensor, graph.folder)
        graph.external |= is_external(tensor)
    bare = skeleton(graph)
    found = structure_error(bare)
    if found is not None:
        raise InputError(f"{path}, an invalid model ({found})", "one the ONNX checker accepts", "export it again")
    graph.tolerated = inference_errors(bare)
    return graph


def save(graph: Graph, path: Path) -> None:
    """Write the model: the same bytes for the same graph, and either all of them or none.

    Weights of at least 1 KiB go to `<name>.data` beside the model if they came from external files or if the model
    would not fit into one; they are copied one at a time.

    Raises:
        InputError: if the files cannot be written; whatever was at `path` before is still there.
    """
    if path.is_dir():
        raise InputError(f"{path}, a directory", "a file name", "name the file to write")
    inline = sum(tensor_bytes(t) for scope in graph.scopes() for t in scope.initializers.values())
    try:
        if graph.external or inline > INLINE_LIMIT:
            _save_external(graph, path)
        else:
            with _replacing(path) as file:
                file.write(_serialize(graph.to_proto(), path))
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise InputError(
            f"{path}, which cannot be written ({reason})", "a writable file", "check path and space"
        ) from error


def copy(source: Path, path: Path) -> None:
    """Write a model again, byte for byte; one with external data gets a data file of its own, as `save` names it.

    Raises:
        InputError: if the file cannot be read or written.
    """
    graph = load(source)
    if graph.external:
        save(graph, path)
        return
    try:
        with _replacing(path) as file:
            file.write(source.read_bytes())
    except OSError as error:
        raise InputError(f"{path} ({error.strerror})", "a path that can be written", "choose another") from error


def model_sha256(path: Path) -> str:
    """SHA-256 over a model file and the external files it names, in the order of their names.

    Raises:
        InputError: if the file or one it names cannot be read.
    """
    files = {region(tensor, path.parent).file for tensor in tensors(_parse(path)) if is_external(tensor)}
    digest = hashlib.sha256()
    for file in (path, *sorted(files)):
        with file.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def _parse(path: Path) -> ModelProto:
    try:
        if path.is_dir():
            raise InputError(f"{path}, a directory", "an ONNX file", "name the file in it")
        if not path.is_file():
            raise InputError(f"{path}, which does not exist", "an ONNX file", "check the path")
        size = path.stat().st_size
        if not 0 < size <= PROTOBUF_LIMIT:
            raise InputError(f"{path} of {size} bytes", "between 1 byte and 2 GB", "export the model again")
        model = ModelProto()
        model.ParseFromString(path.read_bytes())
    except OSError as error:
        reason = os.strerror(error.errno or errno.EIO)
        raise InputError(
            f"{path}, which cannot be read ({reason})", "a readable file", "check its permissions"
        ) from error
    except DecodeError as error:
        raise InputError(
            f"{path}, which is truncated or not ONNX", "an ONNX model", "export or copy it again"
        ) from error
    return model


def _validate(tensor: TensorProto, folder: Path | None) -> None:
    """Refuse data that do not fit type and shape: the skeleton the checker sees does not hold them."""
    if is_external(tensor):
        region(tensor, folder)
        return
    got = f"tensor {tensor.name!r} of element type {tensor.data_type} and shape {list(tensor.dims)}"
    try:
        size = tensor_bytes(tensor)
    except KeyError as error:
        raise InputError(got, "a type this onnx release knows", "update onnx or export the model again") from error
    if any(dim < 0 for dim in tensor.dims) or (tensor.HasField("raw_data") and len(tensor.raw_data) != size):
        raise InputError(f"{got} with {len(tensor.raw_data)} bytes", f"{size} bytes", "export the model again")
    try:
        onnx.checker.check_tensor(tensor)
    except (ValidationError, ValueError) as error:
        raise InputError(f"{got} ({first_line(error)})", "a valid tensor", "export the model again") from error


def _serialize(model: ModelProto, path: Path) -> bytes:
    if model.ByteSize() > PROTOBUF_LIMIT:
        raise InputError(f"a graph too large for {path}", "at most 2 GB without weights", "use external data")
    return model.SerializeToString(deterministic=True)


class _Store:
    """Appends weights to a data file and gives back references to them.

    References carry the temporary file's name, which nothing else can be called, until `finish` puts in the real one.
    """

    def __init__(self, graph: Graph, file: BinaryIO, mark: str) -> None:
        self.graph, self.file, self.mark, self.end = graph, file, mark, 0

    def put(self, tensor: TensorProto) -> TensorProto:
        """Write the tensor's data if they are large and return a reference; small data are returned inline."""
        size = tensor_bytes(tensor)
        if size < SMALLEST_EXTERNAL or tensor.data_type == TensorProto.STRING:
            return (
                with_raw_data(tensor, raw_bytes(tensor, self.graph.folder).tobytes()) if is_external(tensor) else tensor
            )
        data = raw_bytes(tensor, self.graph.folder)
        align = PAGE if size >= 1 << 20 else 64
        start = -(-self.end // align) * align
        self.file.write(bytes(start - self.end))
        for chunk in np.split(data, range(CHUNK, size, CHUNK)):
            self.file.write(chunk.data)
        self.end = start + size
        reference = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        reference.metadata_props.extend(tensor.metadata_props)
        if tensor.HasField("doc_string"):
            reference.doc_string = tensor.doc_string
        reference.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self.mark), ("offset", start), ("length", size)):
            reference.external_data.append(StringStringEntryProto(key=key, value=str(value)))
        return reference

    def finish(self, model: ModelProto, location: str) -> None:
        """Store what is still external elsewhere (Constant nodes, functions) and name the file `location`."""
        for tensor in tensors(model):
            if is_external(tensor):
                if tensor.external_data[0].value != self.mark:
                    tensor.CopyFrom(self.put(tensor))
                if is_external(tensor):
                    tensor.external_data[0].value = location


def data_of(path: Path) -> Path:
    """The external data of a model that is written to `path`."""
    return path.with_name(f"{path.name}.data")


def _save_external(graph: Graph, path: Path) -> None:
    spare_sources(graph, path)
    target = data_of(path)
    new = not target.exists()
    try:
        with _replacing(path) as file, _replacing(target) as data:
            store = _Store(graph, data, Path(data.name).name)
            model = graph.to_proto(store.put)
            store.finish(model, target.name)
            file.write(_serialize(model, path))
    except BaseException:
        if new:
            target.unlink(missing_ok=True)
        raise


def spare_sources(graph: Graph, path: Path) -> None:
    """Refuse a path for the result that, itself or its external data, would take the place of the model's own data.

    Raises:
        InputError: if they would.
    """
    read = {region(t, graph.folder).file.resolve() for t in tensors(graph.to_proto(_bare)) if is_external(t)}
    if path.resolve() in read:
        raise InputError(f"{path}, which holds weights of the model", "a file the model is not read from", "rename it")
    target = data_of(path).resolve()
    if target in read:
        raise InputError(
            f"{path}, whose weights would replace {target}", "files the model is not read from", "rename it"
        )


def _bare(tensor: TensorProto) -> TensorProto:
    return tensor if is_external(tensor) else TensorProto(name=tensor.name)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all.

    Raises:
        InputError: if it cannot be written.
    """
    try:
        with _replacing(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise InputError(f"{path} ({error.strerror})", "a path that can be written", "choose another") from error


@contextlib.contextmanager
def _replacing(path: Path) -> Generator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends well, and vanishes when it does not."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
