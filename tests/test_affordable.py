"""Calibration takes as many samples as the activations of a refit have room for, and says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from builders import model as model_of
from builders import value
from onnx import ModelProto
from refits import samples
from roads import node
from walks import residual, weight

from onnx_lowrank import Settings, apply, optimize
from onnx_lowrank.calibration import affordable as module
from onnx_lowrank.calibration.affordable import NETWORKS, affordable, carried
from onnx_lowrank.calibration.samples import Samples
from onnx_lowrank.data import Dataset
from onnx_lowrank.data.dataset import Part
from onnx_lowrank.goals import KeepMacs
from onnx_lowrank.graph import io
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.target import Target

TARGET = Target(threads=1)
SHAPE = (3, 8, 8)
# Two tensors of 12 channels are held between the two layers of a block; behind it a third is written beside them.
WIDEST = 4 * 12 * 64 * 3
HEADERS = 3 * 128


def taken(given: Samples, folder: Path) -> Samples:
    return affordable(given, Graph(residual()), TARGET, folder)


def test_what_a_walk_carries_is_measured_for_every_shape(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    small, large = (rng.standard_normal((40, 3, size, size)).astype(np.float32) for size in (8, 16))
    graph = Graph(anywhere())
    alone = [carried(one_of(array), graph, TARGET, folder(tmp_path)) for array in (small, large)]
    assert alone[1] == pytest.approx(4 * alone[0], rel=0.05)
    assert carried(one_of(small, large), graph, TARGET, folder(tmp_path)) == pytest.approx(sum(alone), rel=0.05)
    images = samples(64, "image", SHAPE)
    found = carried(images, Graph(residual()), TARGET, folder(tmp_path))
    assert 0 <= found / len(images) - WIDEST <= HEADERS


def anywhere() -> ModelProto:
    """Two convolutions on an image of any size."""
    weights = {"a": weight(6, 3, 3, 3), "b": weight(6, 6, 3, 3)}
    nodes = [node("Conv", "x a", "y", "one", pads=[1] * 4), node("Conv", "y b", "z", "two", pads=[1] * 4)]
    return model_of(nodes, [value("x", ["N", 3, "H", "W"])], [value("z", ["N", 6, "H", "W"])], weights)


def one_of(*arrays: np.ndarray, batch: int | None = None) -> Samples:
    """Half of every array to fit on, half to judge."""
    fit, judge = (Dataset(tuple(Part({"x": a[at::2]}) for a in arrays), frozenset(), batch) for at in (0, 1))
    return Samples(fit, judge)


def folder(at: Path) -> Path:
    made = at / str(len(list(at.iterdir())))
    made.mkdir()
    return made


def test_samples_that_have_room_are_all_used(tmp_path: Path) -> None:
    given = samples(40, "image", SHAPE)
    assert taken(given, tmp_path) is given
    assert not given.notes
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("most", [20, 7, 2])
def test_others_are_left_out_by_content(most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_CARRIED", most * NETWORKS * (WIDEST + HEADERS))
    given = samples(64, "image", SHAPE)
    used = taken(given, tmp_path)
    assert 2 <= len(used) <= most
    assert min(len(used.fit), len(used.judge)) >= 1
    assert used.unused == len(given) - len(used)
    assert set(used.fit.fingerprints) < set(given.fit.fingerprints)
    assert set(used.judge.fingerprints) < set(given.judge.fingerprints)
    assert used.notes == (f"{used.unused} samples are not used: the activations of more than {len(used)} have no room",)
    backwards = Samples(given.fit.take(slice(None, None, -1)), given.judge)
    assert set(taken(backwards, tmp_path).fit.fingerprints) == set(used.fit.fingerprints)


@pytest.mark.parametrize(("batch", "share"), [(None, 0.3), (4, 0.3), (4, 0.01)])
def test_a_share_of_samples_of_several_shapes(batch: int | None, share: float) -> None:
    rng = np.random.default_rng(1)
    arrays = [rng.standard_normal((n, 3, size, size)).astype(np.float32) for n, size in ((64, 8), (16, 9), (8, 10))]
    given = one_of(*arrays, batch=batch)
    used = given.thinned(share)
    for part in (used.fit, used.judge):
        assert len(part) <= max(share * 44, batch or 1)
        assert len(part) >= 1
        assert all(len(each) % (batch or 1) == 0 for each in part.parts)
    assert used.unused == len(given) - len(used)


@pytest.mark.usefixtures("quick")
def test_the_report_says_so_and_apply_takes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_CARRIED", 16 * NETWORKS * (WIDEST + HEADERS))
    model, data = tmp_path / "model.onnx", tmp_path / "data.npz"
    io.save(Graph(residual()), model)
    np.savez(data, image=np.random.default_rng(0).standard_normal((64, *SHAPE)).astype(np.float32))
    settings = Settings(KeepMacs(0.5), TARGET, calibration=data)
    report, plan = optimize(model, tmp_path / "out.onnx", settings)
    assert report.samples is not None
    assert report.samples.fitted + report.samples.judged <= 16
    assert any("have no room" in note for note in report.notes)
    apply(model, plan, tmp_path / "again.onnx", calibration=data)
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "out.onnx").read_bytes()
