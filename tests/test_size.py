"""How large a model is: parameters, and bytes on disk wherever its weights lie."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from builders import conv_model, everything_model

from onnx_lowrank.errors import InputError
from onnx_lowrank.graph import Graph
from onnx_lowrank.graph.size import file_bytes, parameters
from onnx_lowrank.latency.race import race, race_targets
from onnx_lowrank.signature import signature_of
from onnx_lowrank.synthetic import synthetic_feeds
from onnx_lowrank.target import Target


def test_parameters_are_all_constants_but_shapes_and_indices() -> None:
    assert parameters(Graph(conv_model([1, 3, 8, 8], [4, 3, 3, 3]))) == 4 * 3 * 9 + 4
    assert parameters(Graph(everything_model())) == 20 * 20 + 20 * 20 + 2 * 20  # initializer, Constant, both branches


def test_bytes_of_external_files_count_whatever_their_name(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(conv_model([1, 3, 8, 8], [4, 3, 3, 3]), path)
    assert file_bytes(path) == path.stat().st_size
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="some.weights", size_threshold=0)
    assert file_bytes(path) == path.stat().st_size + (tmp_path / "some.weights").stat().st_size
    (tmp_path / "some.weights").unlink()
    with pytest.raises(InputError, match=r"some\.weights"):
        file_bytes(path)


def test_models_too_large_to_be_open_together_are_timed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, target = tmp_path / "m.onnx", Target(threads=1)
    onnx.save(conv_model([1, 3, 8, 8], [4, 3, 3, 3]), path)
    samples = [(synthetic_feeds(signature_of(onnx.load(path)).inputs, None, 0), 1.0)]
    monkeypatch.setattr("onnx_lowrank.latency.race.LARGE_BYTES", 0)
    for found in (
        race([(path, "all"), (path, "extended")], target, samples, 0.1),
        race_targets(path, "all", [target, Target(threads=2)], samples, 0.1),
    ):
        assert len(found.timings) == 2
        assert found.rounds >= 5
