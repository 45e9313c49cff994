"""Calibration takes as many samples as the activations of a refit have room for, and says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_refit import samples
from walks import residual, stopping

from onnx_lowrank import Settings, apply, optimize
from onnx_lowrank.calibration import affordable as module
from onnx_lowrank.calibration.affordable import NETWORKS, affordable
from onnx_lowrank.calibration.samples import Samples
from onnx_lowrank.calibration.walk import Front, route
from onnx_lowrank.goals import KeepMacs
from onnx_lowrank.graph import io
from onnx_lowrank.graph.layers import layers
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.target import Target

TARGET = Target(threads=1)
SHAPE = (3, 8, 8)
# Two tensors of 12 channels wait in front of a convolution beside another one, and a third is written.
WIDEST = 4 * 12 * 64 * 3


def taken(given: Samples, folder: Path) -> Samples:
    graph = Graph(residual())
    return affordable(given, graph, layers(graph)[0], TARGET, folder)


def test_the_most_that_a_front_held_is_known(tmp_path: Path) -> None:
    graph, found = stopping(residual())
    front = Front(tmp_path, TARGET)
    front.put({"image": np.zeros((1, *SHAPE), np.float32)})
    for names in route(graph, {key: stop.operand for key, stop in found.items()}).fronts:
        front.advance(graph, names)
    files = 3 * 128  # headers
    assert 0 <= front.most_bytes - WIDEST <= files


def test_samples_that_have_room_are_all_used(tmp_path: Path) -> None:
    given = samples(40, "image", SHAPE)
    assert taken(given, tmp_path) is given
    assert not given.notes
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("most", [20, 7, 2])
def test_others_are_left_out_by_content(most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_CARRIED", most * NETWORKS * (WIDEST + 3 * 128))
    given = samples(64, "image", SHAPE)
    used = taken(given, tmp_path)
    assert len(used) <= most
    assert len(used.fit) >= 1
    assert len(used.judge) >= 1
    assert used.unused == len(given) - len(used)
    assert set(used.fit.fingerprints) < set(given.fit.fingerprints)
    assert set(used.judge.fingerprints) < set(given.judge.fingerprints)
    assert used.notes == (f"{used.unused} samples are not used: the activations of more than {len(used)} have no room",)
    backwards = Samples(given.fit.take(slice(None, None, -1)), given.judge)
    assert set(taken(backwards, tmp_path).fit.fingerprints) == set(used.fit.fingerprints)


def test_the_report_says_so_and_apply_takes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_CARRIED", 16 * NETWORKS * (WIDEST + 3 * 128))
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
