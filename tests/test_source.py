"""What a run reads: no sample is both fitted on and reported on, and none both chosen by and reported on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from roads import network, on_one_thread, save

from onnx_lowrank.data import Dataset
from onnx_lowrank.errors import InputError
from onnx_lowrank.goals import KeepMacs
from onnx_lowrank.pipeline import apply, plan
from onnx_lowrank.search.source import read_source


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3, 16, 16)).astype(np.float32)


def written(folder: Path, calibration: np.ndarray, labelled: np.ndarray) -> tuple[Path, Path, Path]:
    """A model, and both kinds of samples as files."""
    paths = folder / "calibration.npz", folder / "labelled.npz"
    np.savez(paths[0], image=calibration)
    np.savez(paths[1], image=labelled, label=np.zeros(len(labelled), np.int64))
    return save(network(32), folder), *paths


def held(data: Dataset | None) -> set[str]:
    assert data is not None
    return {*data.fingerprints.tolist()}


def test_choosing_and_reporting_share_no_sample(tmp_path: Path) -> None:
    source = read_source(*written(tmp_path, images(8), images(40, 1)))
    assert len(held(source.choosing)) == len(held(source.reporting)) == 20
    assert not held(source.choosing) & held(source.reporting)


def test_samples_reported_on_are_not_calibrated_with(tmp_path: Path) -> None:
    both = images(40)
    model, calibration, labelled = written(tmp_path, both, both[::-1][:10])
    source = read_source(model, calibration, labelled)
    assert not held(source.data) & held(source.labelled)
    assert len(held(source.data)) == 30
    assert source.held_out is not None
    assert source.held_out.notes == ("10 calibration samples are among those of --eval and are left out",)
    apart = read_source(*written(tmp_path, images(40), images(10, 1)))
    assert apart.held_out is not None
    assert (len(held(apart.data)), apart.held_out.notes) == (40, ())


def test_a_set_that_is_wholly_reported_on_is_refused(tmp_path: Path) -> None:
    model, calibration, labelled = written(tmp_path, images(16), images(16))
    with pytest.raises(InputError) as caught:
        read_source(model, calibration, labelled)
    assert str(caught.value) == (
        f"got 16 calibration samples of {calibration} that are all among those of --eval; "
        "expected some to fit on that the metric is not taken on; give others, or leave one out"
    )


@pytest.mark.usefixtures("quick")
def test_a_plan_is_applied_with_the_samples_that_were_left_for_it(tmp_path: Path) -> None:
    both = images(32)
    model, calibration, labelled = written(tmp_path, both, both[:8])
    settings = on_one_thread(KeepMacs(0.6), calibration=calibration, eval=labelled)
    made = plan(model, settings).best.plan
    with pytest.raises(InputError, match="for a plan made with data"):
        apply(model, made, tmp_path / "out.onnx", calibration=calibration)
    for name, turn in (("one.onnx", 1), ("two.onnx", -1)):
        np.savez(calibration, image=both[::turn])
        apply(model, made, tmp_path / name, calibration=calibration, labelled=labelled)
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()
