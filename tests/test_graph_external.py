"""External references: read through a memory map, and never outside the model's folder."""

from __future__ import annotations

import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnx_lowrank.errors import InputError
from onnx_lowrank.graph import make_tensor, read_tensor, tensor_bytes

PACKED = [ml_dtypes.int4, ml_dtypes.uint4, ml_dtypes.float4_e2m1fn]
WHOLE = [
    np.float32,
    np.float64,
    np.float16,
    np.int64,
    np.bool_,
    np.complex64,
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn,
]


def reference(
    location: str,
    dims: tuple[int, ...] = (4,),
    elem_type: int = TensorProto.FLOAT,
    offset: int | str = 0,
    length: int | str = "",
) -> TensorProto:
    """A tensor whose data lie in `location`."""
    tensor = TensorProto(name="w", data_type=elem_type, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, entry in {"location": location, "offset": offset, "length": length}.items():
        tensor.external_data.add(key=key, value=str(entry))
    return tensor


@pytest.mark.parametrize("dtype", WHOLE + PACKED, ids=lambda dtype: np.dtype(dtype).name)
def test_every_type_reads_the_same_inline_and_external(dtype: type, tmp_path: Path) -> None:
    array = np.arange(-7, 8).reshape(3, 5).astype(dtype)
    inline = make_tensor("w", array)
    assert tensor_bytes(inline) == len(inline.raw_data)
    (tmp_path / "w.bin").write_bytes(b"#" * 3 + inline.raw_data + b"rest")
    outside = reference("w.bin", (3, 5), inline.data_type, offset=3, length=len(inline.raw_data))
    for tensor in (inline, outside):
        got = read_tensor(tensor, tmp_path)
        assert got.dtype == array.dtype
        assert got.tobytes() == array.tobytes()
    if dtype in WHOLE:
        assert not read_tensor(outside, tmp_path).flags.owndata


@settings(deadline=None, max_examples=20)
@given(st.integers(TensorProto.FLOAT, TensorProto.BFLOAT16).filter(lambda t: t != TensorProto.STRING))
def test_make_tensor_rounds_to_the_type_asked_for(elem_type: int) -> None:
    tensor = make_tensor("w", np.array([1.0, 0.0]), elem_type)
    assert tensor.data_type == elem_type
    assert numpy_helper.to_array(tensor).dtype == helper.tensor_dtype_to_np_dtype(elem_type)


@pytest.mark.parametrize("location", ["/etc/hostname", "../secret", "sub/../../secret", "link", "", "..", "."])
def test_reference_that_leaves_the_folder_is_refused(location: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(bytes(16))
    (folder / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError) as caught:
        read_tensor(reference(location), folder)
    expected = {
        ".": f"got tensor 'w' with external data in '.', which is not in {folder}; expected the file beside the model; "
        "copy it there"
    }.get(
        location,
        f"got tensor 'w' with external data in {location!r}, outside the model's folder; "
        "expected a path inside that folder; put a copy of the file beside the model",
    )
    assert str(caught.value) == expected


def test_reference_through_a_link_inside_the_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    (tmp_path / "link").symlink_to("w.bin")
    np.testing.assert_array_equal(read_tensor(reference("link"), tmp_path), np.arange(4, dtype=np.float32))


def test_missing_and_short_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(15))
    with pytest.raises(InputError) as caught:
        read_tensor(reference("no.bin"), tmp_path)
    assert str(caught.value) == (
        f"got tensor 'w' with external data in 'no.bin', which is not in {tmp_path}; "
        "expected the file beside the model; copy it there"
    )
    with pytest.raises(InputError) as caught:
        read_tensor(reference("w.bin"), tmp_path)
    assert str(caught.value) == (
        f"got {tmp_path / 'w.bin'} of 15 bytes, too short for tensor 'w'; expected at least 16 bytes; "
        "copy the file again, completely"
    )


@pytest.mark.parametrize(("offset", "length"), [(-4, 16), (0, 12), ("ten", 16), (0, 1 << 80), (1 << 80, 16)])
def test_malformed_reference_is_refused(offset: int | str, length: int | str, tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(64))
    with pytest.raises(InputError, match=r"export the model again|copy the file again"):
        read_tensor(reference("w.bin", offset=offset, length=length), tmp_path)


def test_reference_to_something_that_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for location in ("pipe", "nul\0byte"):
        with pytest.raises(InputError, match="external data in"):
            read_tensor(reference(location), tmp_path)


def test_model_without_folder_cannot_have_external_data() -> None:
    with pytest.raises(InputError, match="in a model that has no folder"):
        read_tensor(reference("w.bin"), None)
