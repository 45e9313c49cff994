"""What a run reads: no sample is both fitted on and reported on, and none both chosen by and reported on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from roads import network, on_one_thread, save

from onnx_lowrank.data import Dataset
from onnx_lowrank.errors import InputError, NonFiniteResultError
from onnx_lowrank.goals import KeepMacs
from onnx_lowrank.pipeline import apply, optimize, plan
from onnx_lowrank.progress import Phases
from onnx_lowrank.report import assemble
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


def test_an_original_that_cannot_be_scored_is_named_before_the_search(tmp_path: Path) -> None:
    labelled = images(8)
    labelled[3] = 3e38
    model, _, path = written(tmp_path, images(1), labelled)
    phases = Phases()
    with pytest.raises(
        InputError, match=r"got 1 of 8 samples with NaN or infinite mse, in outputs of model.onnx, the o"
    ):
        optimize(model, tmp_path / "out.onnx", on_one_thread(KeepMacs(0.6), eval=scored(path, 8), metric="mse"), phases)
    assert phases.seconds.keys() == {"read", "evaluate"}


@pytest.mark.usefixtures("quick")
def test_a_result_that_cannot_be_scored_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, path = written(tmp_path, images(1), images(8))
    real, asked = assemble.evaluate, list[Path]()

    def evaluate(file: Path, *arguments: object) -> object:
        asked.append(file)
        if len(asked) == 1:
            raise NonFiniteResultError("1 of 8 samples with NaN or infinite mse, in outputs of out.onnx", "", "")
        return real(file, *arguments)  # pyright: ignore[reportArgumentType] - passed on as they are

    monkeypatch.setattr(assemble, "evaluate", evaluate)
    report, made = optimize(
        model, tmp_path / "out.onnx", on_one_thread(KeepMacs(0.6), eval=scored(path, 8), metric="mse")
    )
    assert made.changes_nothing
    assert not report.goal.reached
    assert "samples with NaN or infinite mse, in outputs of out.onnx: the original is written" in report.goal.reason
    assert report.accuracy is not None
    assert report.accuracy.after == report.accuracy.before
    report.to_json()


@pytest.mark.usefixtures("quick")
def test_intervals_of_the_metric_draw_the_sources_that_are_named(tmp_path: Path) -> None:
    model, _, path = written(tmp_path, images(1), images(20))
    given = dict(np.load(path))
    bounds: list[float] = []
    for sources in (np.arange(20), np.arange(20) // 5):
        np.savez(path, **given, source=sources)
        accuracy = optimize(model, tmp_path / "out.onnx", on_one_thread(KeepMacs(1.0), eval=path))[0].accuracy
        assert accuracy is not None
        bounds.append(accuracy.ci95[1])
    assert bounds == pytest.approx([1 - 0.025 ** (1 / 20), 1 - 0.025 ** (1 / 4)])


def scored(path: Path, count: int) -> Path:
    """The labelled samples of `path` with values for mse instead of classes."""
    np.savez(path, image=np.load(path)["image"], label=np.zeros((count, 10), np.float32))
    return path
