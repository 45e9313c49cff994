"""Padding: found by trial, left out of the rows, and told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import model, run_model, value, worst_error
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper
from samples import TEXT
from typer.testing import CliRunner

from onnx_lowrank.calibration.samples import Samples, suited
from onnx_lowrank.calibration.unfold import Unfolding
from onnx_lowrank.cli import app
from onnx_lowrank.data import Dataset, read_npz
from onnx_lowrank.layer import Form, LayerShape
from onnx_lowrank.padding import padding
from onnx_lowrank.pipeline import apply
from onnx_lowrank.plan import Plan
from onnx_lowrank.target import Target

pytestmark = pytest.mark.usefixtures("quick")
WORDS, WIDTH, OUT = 50, 24, 16
PRODUCT = LayerShape(1, OUT, WIDTH, ())


def sentence_model(output: str = "sentence", *, masked: bool = True) -> ModelProto:
    """Words are embedded, multiplied, and those that count summed; `tokens` is before the sum."""
    rng = np.random.default_rng(0)
    arrays = {
        "table": rng.standard_normal((WORDS, WIDTH)),
        "weight": rng.standard_normal((WIDTH, WIDTH)),
        "last": rng.standard_normal((WIDTH, OUT)),
    }
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["embedded"]),
        helper.make_node("MatMul", ["embedded", "weight"], ["hidden"], "first"),
        helper.make_node("Relu", ["hidden"], ["active"]),
        helper.make_node("MatMul", ["active", "last"], ["tokens"], "second"),
        helper.make_node("Cast", ["mask"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["numbers", "axis"], ["weights"]),
        helper.make_node("Mul", ["tokens", "weights" if masked else "one"], ["weighted"]),
        helper.make_node("ReduceSum", ["weighted", "positions"], ["sentence"], keepdims=0),
    ]
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    arrays |= {"axis": np.array([2]), "positions": np.array([1]), "one": np.ones(1, np.float32)}
    inputs = [value("ids", ("N", "T"), TensorProto.INT64), value("mask", ("N", "T"), TensorProto.INT64)]
    shapes = {"sentence": ("N", OUT), "tokens": ("N", "T", OUT)}
    return model(nodes, inputs, [value(output, shapes[output])], arrays)


def texts(folder: Path, count: int = 64, length: int = 20, seed: int = 0) -> Path:
    """Ids and masks; three quarters are padding, all of it the same word."""
    rng = np.random.default_rng(seed)
    mask = (np.arange(length) < rng.integers(2, 9, count)[:, None]).astype(np.int64)
    ids = np.where(mask == 1, rng.integers(1, WORDS, (count, length)), 0)
    np.savez(folder / "texts.npz", ids=ids, mask=mask)
    return folder / "texts.npz"


def saved(folder: Path, proto: ModelProto) -> Path:
    onnx.save(proto, folder / "model.onnx")
    return folder / "model.onnx"


def read(path: Path) -> Dataset:
    return read_npz(path, TEXT)


def test_positions_no_output_depends_on_are_padding(tmp_path: Path) -> None:
    data = read(texts(tmp_path))
    found = padding(saved(tmp_path, sentence_model()), data, Target(), 8)
    assert found is not None
    zeros = float(np.mean(np.load(tmp_path / "texts.npz")["mask"] == 0))
    assert (found.mask, found.share) == ("mask", pytest.approx(zeros))
    feeds = next(data.feeds(8))
    np.testing.assert_array_equal(found.counted(feeds), feeds["mask"] == 1)
    said = f"{zeros:.0%} of the positions are padding that no output depends on (mask)"
    assert str(found) == f"{said}: left out of layers that see them one by one"


@pytest.mark.parametrize("proto", [sentence_model("tokens"), sentence_model(masked=False)], ids=["tokens", "all"])
def test_positions_an_output_depends_on_count(tmp_path: Path, proto: ModelProto) -> None:
    assert padding(saved(tmp_path, proto), read(texts(tmp_path)), Target(), 8) is None


def test_a_mask_of_ones_is_none(tmp_path: Path) -> None:
    np.savez(tmp_path / "texts.npz", ids=np.ones((8, 4), np.int64), mask=np.ones((8, 4), np.int64))
    assert padding(saved(tmp_path, sentence_model()), read(tmp_path / "texts.npz"), Target(), 8) is None


@settings(deadline=None, max_examples=25)
@given(
    mask=st.lists(st.lists(st.booleans(), min_size=7, max_size=7).filter(any), min_size=1, max_size=5),
    most=st.integers(1, 9),
)
def test_rows_are_those_that_count(mask: list[list[bool]], most: int) -> None:
    counted = np.array(mask)
    x = np.arange(counted.size * WIDTH, dtype=np.float32).reshape(*counted.shape, WIDTH)
    form = Form("MatMul", TensorProto.FLOAT, 17)
    unfolding = Unfolding(form, PRODUCT, most)
    rows = unfolding.rows(x, counted)
    assert rows.shape[1:] == (1, WIDTH)
    wanted = {tuple(row) for row in x[counted]}
    assert {tuple(row) for row in rows[:, 0]} <= wanted
    assert len(rows) == np.minimum(counted.sum(axis=1), most).sum()
    alone = [unfolding.rows(x[i : i + 1], counted[i : i + 1]) for i in range(len(x))]
    np.testing.assert_array_equal(np.concatenate(alone), rows)
    y = np.ones((*counted.shape, OUT), np.float32)
    assert len(unfolding.targets(y, counted)) == len(rows)


@pytest.mark.parametrize("shape", [(12, WIDTH), (4, 3, WIDTH), (3, 4, 2, WIDTH)], ids=["flat", "time first", "heads"])
def test_rows_whose_order_is_not_known_all_count(shape: tuple[int, ...]) -> None:
    counted = np.arange(4) < np.array([[1], [2], [4]])
    unfolding = Unfolding(Form("MatMul", TensorProto.FLOAT, 17), PRODUCT, 100)
    x = np.ones(shape, np.float32)
    assert len(unfolding.rows(x, counted)) == x.size // WIDTH
    square = np.ones((3, 3), np.bool_) & (np.arange(3) < 2)
    assert len(unfolding.rows(np.ones((3, 3, WIDTH), np.float32), square)) == 9


def test_a_batch_is_not_as_large_as_its_texts_are_long(tmp_path: Path) -> None:
    data = read(texts(tmp_path, 96, length=32))
    samples = suited(
        Samples(data.take(slice(64)), data.take(slice(64, 96))), saved(tmp_path, sentence_model()), Target()
    )
    assert samples.padding is not None
    assert samples.largest_batch == 31


def test_infinities_hide_no_difference(tmp_path: Path) -> None:
    """Logits of -inf beside finite ones that padding changes."""
    proto = sentence_model(masked=False)
    infinite = numpy_helper.from_array(np.full(1, -np.inf, np.float32), "infinite")
    proto.graph.initializer.append(infinite)
    proto.graph.node[-1].output[0] = "summed"
    proto.graph.node.append(helper.make_node("Concat", ["summed", "infinities"], ["sentence"], axis=1))
    proto.graph.node.insert(0, helper.make_node("Expand", ["infinite", "two"], ["infinities"]))
    proto.graph.initializer.append(numpy_helper.from_array(np.array([8, 1]), "two"))
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = OUT + 1
    assert padding(saved(tmp_path, proto), read(texts(tmp_path)), Target(), 8) is None


def test_padding_is_left_out_and_told(tmp_path: Path) -> None:
    """What the padding holds makes no difference to the fit, and the report says why."""
    path, data = saved(tmp_path, sentence_model()), texts(tmp_path, 256)
    arrays = dict(np.load(data), source=np.arange(256))  # else what a text holds decides where it belongs
    np.savez(data, **arrays)
    rng = np.random.default_rng(1)
    # The same texts with padding of any content: the same rows count.
    arrays["ids"] = np.where(arrays["mask"] == 1, arrays["ids"], rng.integers(1, WORDS, arrays["ids"].shape))
    np.savez(tmp_path / "other.npz", **arrays)
    words = ["optimize", str(path), "-o", str(tmp_path / "out.onnx"), "--plan-out", str(tmp_path / "plan.json")]
    words += ["--calibration", str(data), "--keep-macs", "0.7", "--threads", "1", "--report", str(tmp_path / "told")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "told" / "report.json").read_text())
    assert any("padding that no output depends on (mask)" in note for note in report["notes"])
    plan, other = Plan.read(tmp_path / "plan.json"), tmp_path / "other.npz"
    apply(path, plan, tmp_path / "other.onnx", calibration=other, force=True)
    feeds = {name: arrays[name][:64] for name in ("ids", "mask")}
    first, second = (run_model(onnx.load(tmp_path / name), feeds) for name in ("out.onnx", "other.onnx"))
    assert worst_error(first, second) < 1e-4
