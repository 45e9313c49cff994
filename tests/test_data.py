"""Reading .npz files: what fits is taken exactly, all else is refused with a sentence."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from onnx_lowrank.data import read_npz
from onnx_lowrank.errors import InputError
from onnx_lowrank.signature import TensorSpec

IMAGE = TensorSpec("x", TensorProto.FLOAT, ("N", 3, 4, "W"))
IDS = TensorSpec("ids", TensorProto.INT64, ("N", "S"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "d.npz"


def images(count: int = 4, width: int = 5) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 3, 4, width)).astype(np.float32)


def test_arrays_labels_and_length(path: Path) -> None:
    x, labels = images(), np.arange(4)
    np.savez(path, x=x, label=labels)
    data = read_npz(path, [IMAGE])
    assert len(data) == 4
    assert np.array_equal(data.parts[0].arrays["x"], x)
    assert data.labels is not None
    assert np.array_equal(data.labels, labels)


def test_an_input_called_label_is_an_input(path: Path) -> None:
    np.savez(path, label=np.ones((2, 3), np.float32))
    data = read_npz(path, [TensorSpec("label", TensorProto.FLOAT, ("N", 3))])
    assert data.labels is None
    assert list(data.parts[0].arrays) == ["label"]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.float16])
def test_exact_casts_into_float32(path: Path, dtype: type) -> None:
    x = np.arange(60).reshape(1, 3, 4, 5).astype(dtype)
    np.savez(path, x=x)
    read = read_npz(path, [IMAGE]).parts[0].arrays["x"]
    assert read.dtype == np.float32
    assert np.array_equal(read, x)


def test_int64_into_int32_where_the_values_fit(path: Path) -> None:
    np.savez(path, ids=np.array([[1, 2]]))
    assert read_npz(path, [TensorSpec("ids", TensorProto.INT32, ("N", "S"))]).parts[0].arrays["ids"].dtype == np.int32


def test_bfloat16_inputs_are_rounded_from_float32(path: Path) -> None:
    spec = TensorSpec("x", TensorProto.BFLOAT16, ("N", 2))
    np.savez(path, x=np.array([[1.0, 3.0]], np.float32))
    assert read_npz(path, [spec]).parts[0].arrays["x"].dtype == spec.dtype


@pytest.mark.parametrize(
    ("arrays", "spec", "text"),
    [
        ({"y": images()}, IMAGE, "no array 'x' in {p}; expected one per input: 'x'; add the missing"),
        (
            {"x": images(), "y": images(), "z": images()},
            IMAGE,
            "unknown arrays 'y', 'z' in {p}; expected the inputs 'x' and optionally 'label', 'source'; "
            "rename or remove them",
        ),
        (
            {"x": images().astype(np.float64)},
            IMAGE,
            "array 'x' in {p} of type float64; expected float, or integers that convert exactly; convert it",
        ),
        (
            {"x": np.full((1, 3, 4, 5), 2**24 + 1)},
            IMAGE,
            "array 'x' in {p} of type int64; expected float, or integers that convert exactly; convert it",
        ),
        (
            {"ids": np.ones((1, 4), np.float32)},
            IDS,
            "array 'ids' in {p} of type float32; expected int64, or integers that convert exactly; convert it",
        ),
        (
            {"x": np.ones((3, 4), np.float32)},
            IMAGE,
            "array 'x' in {p} with 2 axes; expected 4 axes like input 'x' float Nx3x4xW, samples first; reshape it",
        ),
        (
            {"x": np.ones((2, 1, 4, 5), np.float32)},
            IMAGE,
            "array 'x' in {p} of shape 2x1x4x5; expected samples of input 'x' float Nx3x4xW; resize or reshape it",
        ),
        (
            {"x": images(4), "label": np.arange(3)},
            IMAGE,
            "different numbers of samples in {p} (x: 4, label: 3); expected the same number; align the arrays",
        ),
        ({"x": images(0)}, IMAGE, "no samples in {p}; expected at least one; add samples"),
        (
            {"x": np.where(np.arange(60).reshape(1, 3, 4, 5) < 2, np.nan, images(1)).astype(np.float32)},
            IMAGE,
            "2 NaN or infinite values in array 'x' of {p}; expected finite values; clean the data",
        ),
        (
            {"x": images(1), "label": np.array([np.inf])},
            IMAGE,
            "1 NaN or infinite values in array 'label' of {p}; expected finite values; clean the data",
        ),
        (
            {"x": np.array([{"a": 1}], dtype=object)},
            IMAGE,
            "pickled objects in array 'x' of {p}; expected plain arrays; nothing is unpickled; "
            "save it with a numeric type",
        ),
        (
            {"x": np.ones((3, 2), np.float32)},
            TensorSpec("x", TensorProto.FLOAT, (4, 2)),
            "3 samples in {p}; expected at least 4, the batch the model fixes; add samples",
        ),
    ],
)
def test_refusals(path: Path, arrays: dict[str, np.ndarray], spec: TensorSpec, text: str) -> None:
    np.savez(path, **arrays, allow_pickle=True)  # pyright: ignore[reportArgumentType] - numpy takes them by name
    with pytest.raises(InputError) as caught:
        read_npz(path, [spec])
    assert str(caught.value) == "got " + text.format(p=path)


def test_files_that_are_no_npz(tmp_path: Path) -> None:
    pickled, npy = tmp_path / "a.pkl", tmp_path / "a.npy"
    pickled.write_bytes(pickle.dumps({"x": 1}))
    np.save(npy, np.ones(3))
    for path, text in [
        (tmp_path / "none.npz", "which is no file; expected an .npz file; check the path"),
        (tmp_path, "which is no file; expected an .npz file; check the path"),
        (pickled, "which is not in .npz format; expected an .npz file; write it with numpy.savez"),
        (npy, "which is not in .npz format; expected an .npz file; write it with numpy.savez"),
    ]:
        with pytest.raises(InputError) as caught:
            read_npz(path, [IMAGE])
        assert str(caught.value) == f"got {path}, {text}"


def test_an_archive_member_that_is_no_array(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", "text")
    with pytest.raises(InputError, match="which is no array; expected arrays only"):
        read_npz(path, [IMAGE])


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 400), st.integers(1, 255))
def test_damaged_files_are_refused_or_read(tmp_path_factory: pytest.TempPathFactory, position: int, flip: int) -> None:
    path = tmp_path_factory.mktemp("damaged") / "d.npz"
    np.savez(path, x=images(1, 1))
    raw = bytearray(path.read_bytes())
    raw[position % len(raw)] ^= flip
    path.write_bytes(raw)
    message = ""
    try:
        assert len(read_npz(path, [IMAGE])) == 1
    except InputError as error:
        message = str(error)
    assert "\n" not in message


def test_batches_of_an_open_dimension_cover_every_sample(path: Path) -> None:
    x = images(7)
    np.savez(path, x=x)
    batches = [feed["x"] for feed in read_npz(path, [IMAGE]).feeds(3)]
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert np.array_equal(np.concatenate(batches), x)


def test_a_fixed_batch_wins_and_the_tail_is_dropped_with_a_note(path: Path) -> None:
    np.savez(path, x=np.arange(10, dtype=np.float32)[:, None], label=np.arange(10))
    data = read_npz(path, [TensorSpec("x", TensorProto.FLOAT, (4, 1))])
    assert [feed["x"].shape for feed in data.feeds(1)] == [(4, 1), (4, 1)]
    assert len(data) == 8
    assert data.labels is not None
    assert len(data.labels) == 8
    assert data.notes == ("2 of 10 samples are not used: the model takes 4 at a time",)
    assert [feed["x"].shape for feed in data.feeds(1, [0, 2, 4, 6, 7])] == [(4, 1)]


def test_inputs_without_a_batch_axis_are_fed_whole(path: Path) -> None:
    specs = [TensorSpec("x", TensorProto.FLOAT, (1, "T")), TensorSpec("sr", TensorProto.INT64, ())]
    np.savez(path, x=np.ones((2, 5), np.float32), sr=np.array([8000, 16000]))
    feeds = list(read_npz(path, specs).feeds(8))
    assert [(feed["x"].shape, feed["sr"].shape, int(feed["sr"])) for feed in feeds] == [
        ((1, 5), (), 8000),
        ((1, 5), (), 16000),
    ]


def test_contradicting_leading_dimensions(path: Path) -> None:
    specs = [TensorSpec("a", TensorProto.FLOAT, (1, 2)), TensorSpec("b", TensorProto.FLOAT, (4, 2))]
    np.savez(path, a=np.ones((4, 2), np.float32), b=np.ones((4, 2), np.float32))
    with pytest.raises(InputError) as caught:
        read_npz(path, specs)
    assert str(caught.value) == (
        f"got inputs with different leading dimensions (a: 1, b: 4) in {path}; expected one batch size; "
        "give each array one more axis, samples first"
    )


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 40), st.floats(0.01, 0.99), st.integers(0, 5), st.integers(1, 4))
def test_split_is_a_partition_in_whole_batches(
    tmp_path_factory: pytest.TempPathFactory, count: int, fraction: float, seed: int, batch: int
) -> None:
    path = tmp_path_factory.mktemp("split") / "d.npz"
    np.savez(path, x=np.arange(count * batch, dtype=np.float32)[:, None], label=np.arange(count * batch))
    data = read_npz(path, [TensorSpec("x", TensorProto.FLOAT, (batch, 1))])
    rest, held = data.split(fraction, seed)
    assert sorted([*rest.parts[0].arrays["x"].ravel(), *held.parts[0].arrays["x"].ravel()]) == list(
        range(count * batch)
    )
    assert len(held) % batch == 0
    assert min(len(held), len(rest)) >= batch
    assert held.labels is not None
    assert np.array_equal(held.parts[0].arrays["x"].ravel(), held.labels)
    assert held.sha256 == data.split(fraction, seed)[1].sha256


def test_an_input_called_source_is_an_input(path: Path) -> None:
    np.savez(path, source=np.ones((2, 3), np.float32))
    data = read_npz(path, [TensorSpec("source", TensorProto.FLOAT, ("N", 3))])
    assert (data.sources, list(data.parts[0].arrays)) == (None, ["source"])


def test_one_sample_cannot_be_split(path: Path) -> None:
    np.savez(path, x=images(1))
    with pytest.raises(InputError, match="got 1 samples; expected at least 2 to hold some out; give more samples"):
        read_npz(path, [IMAGE]).split(0.5, 0)


def test_the_hash_is_that_of_the_content(tmp_path: Path) -> None:
    plain, packed, other = (tmp_path / name for name in ("a.npz", "b.npz", "c.npz"))
    np.savez(plain, x=images())
    np.savez_compressed(packed, x=images())
    np.savez(other, x=images() + 1)
    first, second, third = (read_npz(path, [IMAGE]).sha256 for path in (plain, packed, other))
    assert first == second != third
