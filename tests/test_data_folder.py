"""Samples from folders of arrays: what goes in comes out, all else is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto
from samples import IMAGE, TEXT, fed, refusal, x

from onnx_lowrank.data import read_npz, read_samples
from onnx_lowrank.errors import InputError
from onnx_lowrank.signature import TensorSpec


def test_single_samples_and_stacks(tmp_path: Path) -> None:
    one, stack = x(3, 4, 5), x(2, 3, 4, 5)
    np.save(tmp_path / "a.npy", one)
    (tmp_path / "more").mkdir()
    np.save(tmp_path / "more" / "b.npy", stack)
    (tmp_path / "README.txt").write_text("not looked at")
    data = read_samples(tmp_path, [IMAGE])
    assert np.array_equal(np.concatenate(fed(data)), [one, *stack])
    assert data.sources is not None
    assert data.sources.tolist() == ["a.npy", "more/b.npy", "more/b.npy"]
    assert (data.origin, data.notes) == (str(tmp_path), ())


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=6), st.integers(1, 3))
def test_every_sample_of_every_shape_is_fed_once_and_never_with_another_shape(
    tmp_path_factory: pytest.TempPathFactory, files: list[tuple[int, int]], batch: int
) -> None:
    folder = tmp_path_factory.mktemp("folder")
    numbers = iter(range(100))
    for i, (count, length) in enumerate(files):
        ids = np.array([[next(numbers)] * length for _ in range(count)])
        np.savez(folder / f"{i}.npz", ids=ids, mask=np.ones_like(ids), label=ids[:, 0])
    data = read_samples(folder, TEXT)
    batches = list(data.batches(batch))
    seen = np.concatenate([feeds["ids"][:, 0] for feeds in data.feeds(batch)])
    assert sorted(seen.tolist()) == list(range(next(numbers)))
    assert len(data.parts) == len({length for _, length in files})
    assert all(len(b.rows) <= batch for b in batches)
    assert all(b.feeds["ids"].shape == b.feeds["mask"].shape == (len(b.rows), b.feeds["ids"].shape[1]) for b in batches)
    assert all(np.array_equal(b.feeds["ids"][:, 0], b.labels) for b in batches if b.labels is not None)
    assert data.labels is not None
    assert np.array_equal(data.labels, seen)
    assert np.array_equal(np.concatenate([b.rows for b in batches]), np.arange(len(data)))


def test_a_folder_of_one_shape_is_the_file_of_all(tmp_path: Path) -> None:
    arrays = x(6, 3, 2, 2)
    np.savez(tmp_path / "all.npz", x=arrays)
    (tmp_path / "folder").mkdir()
    for i, array in enumerate(arrays):
        np.save(tmp_path / "folder" / f"{i}.npy", array)
    whole, pieces = read_npz(tmp_path / "all.npz", [IMAGE]), read_samples(tmp_path / "folder", [IMAGE])
    assert np.array_equal(whole.parts[0].arrays["x"], pieces.parts[0].arrays["x"])
    assert whole.sha256 != pieces.sha256  # the sources say more


def test_samples_of_one_shape_fill_fixed_batches_across_files(tmp_path: Path) -> None:
    fixed = TensorSpec("x", TensorProto.FLOAT, (2, "T"))
    for i, length in enumerate((3, 4, 3, 3, 4, 5)):
        np.save(tmp_path / f"{i}.npy", x(length))
    data = read_samples(tmp_path, [fixed])
    assert [array.shape for array in fed(data)] == [(2, 3), (2, 4)]
    assert data.notes == ("2 of 6 samples are not used: the model takes 2 at a time",)


def test_sources_named_in_files_win(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=x(2, 3, 2, 2), source=[7, 8])
    np.savez(tmp_path / "b.npz", x=x(1, 3, 2, 2), source=[7])
    data = read_samples(tmp_path, [IMAGE])
    assert data.sources is not None
    assert data.sources.tolist() == ["7", "8", "7"]


def test_files_beyond_the_limit_are_left_out_evenly(tmp_path: Path) -> None:
    for i in range(10):
        np.save(tmp_path / f"{i}.npy", np.full((3, 1, 1), i, np.float32))
    data = read_samples(tmp_path, [IMAGE], limit=4)
    assert [int(array.ravel()[0]) for array in fed(data)] == [0, 3, 6, 9]
    assert data.notes == ("4 of 10 files are used, evenly spaced; --samples sets how many",)


def test_samples_of_a_file_beyond_the_limit(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.arange(10, dtype=np.float32)[:, None], source=np.arange(10))
    spec = TensorSpec("x", TensorProto.FLOAT, ("N", 1))
    data = read_samples(tmp_path / "d.npz", [spec], limit=3)
    assert data.notes == ("3 of 10 samples are used, drawn at random; --samples sets how many",)
    np.savez(tmp_path / "e.npz", x=np.arange(10, dtype=np.float32)[::-1, None], source=np.arange(10)[::-1])
    reversed_ = read_samples(tmp_path / "e.npz", [spec], limit=3)
    assert sorted(float(a.item()) for a in fed(data)) == sorted(float(a.item()) for a in fed(reversed_))
    assert len(read_samples(tmp_path / "d.npz", [spec])) == 10


def test_folders_that_are_refused(tmp_path: Path) -> None:
    def folder(name: str, **arrays: np.ndarray) -> Path:
        (tmp_path / name).mkdir()
        for file, array in arrays.items():
            np.save(tmp_path / name / f"{file}.npy", array)
        return tmp_path / name

    empty = folder("empty")
    assert refusal(empty) == f"no samples in {empty}; expected .npy, .npz or image files; check the path"
    shape = folder("shape", a=x(3, 4, 5), b=x(4, 4, 5))
    assert refusal(shape) == (
        f"array 'x' in {shape / 'b.npy'} of shape 1x4x4x5; expected samples of input 'x' float Nx3xHxW; "
        "resize or reshape it"
    )
    axes = folder("axes", a=x(3, 4, 5), b=x(2, 1, 3, 4, 5))
    assert refusal(axes) == (
        f"arrays with different numbers of axes in {axes / 'a.npy'} and {axes / 'b.npy'}; expected the same; "
        "write all alike"
    )
    several = folder("several", a=x(1, 2))
    assert refusal(several, TEXT) == (
        f"{several / 'a.npy'} for the inputs 'ids', 'mask'; expected a name for each array; write .npz files"
    )
    labels = folder("labels")
    np.savez(labels / "a.npz", x=x(2, 3, 2, 2), label=[0, 1])
    np.savez(labels / "b.npz", x=x(2, 3, 2, 2))
    assert refusal(labels) == (
        f"labels of different kinds (numbers in {labels / 'a.npz'}, none in {labels / 'b.npz'}); "
        "expected labels of one kind for all samples; align them"
    )
    text = folder("text")
    (text / "a.npy").write_text("no array")
    assert refusal(text) == (
        f"{text / 'a.npy'}, which holds something else; expected a plain array in .npy format; nothing is unpickled; "
        "write it with numpy.save"
    )
    few = folder("few", a=x(3), b=x(4))
    assert refusal(few, (TensorSpec("x", TensorProto.FLOAT, (2, "T")),)) == (
        f"2 samples in {few}; expected at least 2 of one shape, the batch the model fixes; add samples"
    )


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 200), st.integers(1, 255))
def test_damaged_arrays_are_refused_or_read(tmp_path_factory: pytest.TempPathFactory, position: int, flip: int) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    np.save(folder / "a.npy", np.ones((3, 1, 2), np.float32))
    raw = bytearray((folder / "a.npy").read_bytes())
    raw[position % len(raw)] ^= flip
    (folder / "a.npy").write_bytes(raw)
    message = ""
    try:
        read_samples(folder, [IMAGE])
    except InputError as error:
        message = str(error)
    assert "\n" not in message


@pytest.mark.parametrize(
    ("source", "found"), [(np.array([0.5, 1]), "float64 with 1"), (np.ones((2, 1), int), "int64 with 2")]
)
def test_sources_that_name_nothing(tmp_path: Path, source: np.ndarray, found: str) -> None:
    path = tmp_path / "d.npz"
    np.savez(path, x=x(2, 3, 2, 2), source=source)
    assert refusal(path) == (
        f"array 'source' in {path} of type {found} axes; expected one whole number or text per sample; "
        "name where each sample comes from"
    )


def test_what_does_not_exist(tmp_path: Path) -> None:
    path = tmp_path / "none.npz"
    assert (
        refusal(path)
        == f"{path}, which does not exist; expected an .npz file, a folder or module:function; check the path"
    )
