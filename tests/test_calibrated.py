"""The whole road with samples: nearer than without, the same again, and honest about what it did."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import model, run_model, value, worst_error
from roads import Ride, low_rank, network, node, on_one_thread, ride, save
from walks import embedding, sequences

from onnx_lowrank.errors import InputError
from onnx_lowrank.goals import KeepMacs, MaxDrop, MaxError
from onnx_lowrank.pipeline import apply, optimize
from onnx_lowrank.plan import CALIBRATED, DATA_FREE, REFIT
from onnx_lowrank.search import calibrated

pytestmark = pytest.mark.usefixtures("quick")


narrow = partial(network, 32)  # fitting takes the fourth power of the channels


def smooth(count: int, seed: int) -> np.ndarray:
    """Images (count, 3, 16, 16) of few frequencies, as photographs are: their pixels depend on each other."""
    rng = np.random.default_rng(seed)
    waves = np.cos(np.arange(16)[:, None] * np.arange(4) * np.pi / 16)
    return np.einsum("ncij,hi,wj->nchw", rng.standard_normal((count, 3, 4, 4)), waves, waves).astype(np.float32)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    np.savez(folder / "calibration.npz", image=smooth(96, 0))
    images = smooth(96, 1)
    labels = run_model(narrow(), {"image": images})[0].argmax(axis=1)
    np.savez(folder / "labelled.npz", image=images, label=labels)
    return folder


@pytest.fixture(scope="module")
def trip(data: Path, tmp_path_factory: pytest.TempPathFactory, quick: None) -> Ride:
    settings = on_one_thread(KeepMacs(0.5), calibration=data / "calibration.npz")
    return ride(narrow(), tmp_path_factory.mktemp("trip"), settings)


def error_of(made: Ride) -> float:
    feeds = {"image": smooth(64, 99)}
    return worst_error(run_model(narrow(), feeds), run_model(made.result, feeds))


def test_samples_make_the_result_nearer(trip: Ride, tmp_path: Path) -> None:
    free = ride(narrow(), tmp_path, on_one_thread(KeepMacs(0.5)))
    assert (trip.plan.fit, free.plan.fit) == (REFIT, DATA_FREE)
    assert trip.report.goal.reached
    assert trip.report.size.macs_after <= 0.5 * trip.report.size.macs_before
    assert error_of(trip) < error_of(free)


def test_the_report_tells_samples_errors_and_losses(trip: Ride) -> None:
    report = trip.report
    assert report.calibration == "calibrated on 84 samples, reported on 12 others"
    assert report.loss is not None
    assert {"moments", "sensitivity", "refit"} <= report.timings.keys()
    rewritten = [row for row in report.layers if row.decision == "factorized"]
    assert rewritten
    for row in rewritten:
        assert row.error_refit is not None
        assert row.error_refit <= row.error
        assert "refitted: output error" in row.reason


def test_probed_losses_are_read_from_the_table_and_the_model_is_the_same(
    trip: Ride, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> float:
        raise AssertionError("probed again")

    monkeypatch.setattr(calibrated.Probes, "loss", never)
    settings = on_one_thread(KeepMacs(0.5), calibration=data / "calibration.npz")
    report, _ = optimize(trip.source, tmp_path / "again.onnx", settings)
    assert report.chains_timed == 0
    assert (tmp_path / "again.onnx").read_bytes() == trip.out.read_bytes()


def test_apply_writes_the_same_bytes_again(trip: Ride, data: Path, tmp_path: Path) -> None:
    for name in ("one.onnx", "two.onnx"):
        apply(trip.source, trip.plan, tmp_path / name, calibration=data / "calibration.npz")
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()
    assert (
        worst_error(
            run_model(trip.result, {"image": smooth(8, 1)}),
            run_model(onnx.load(tmp_path / "one.onnx"), {"image": smooth(8, 1)}),
        )
        < 1e-5
    )


def test_a_plan_made_with_samples_is_not_applied_without(trip: Ride, tmp_path: Path) -> None:
    assert trip.plan.data_sha256 is not None
    text = (
        f"got data none for a plan made with data {trip.plan.data_sha256[:12]}; "
        "expected the data the plan was made with; make the plan again, or use --force"
    )
    with pytest.raises(InputError, match=f"^{re.escape(text)}$"):
        apply(trip.source, trip.plan, tmp_path / "out.onnx")
    text = "got a plan of kind refit without its samples; expected --calibration; give the same samples"
    with pytest.raises(InputError, match=f"^{re.escape(text)}$"):
        apply(trip.source, trip.plan, tmp_path / "out.onnx", force=True)
    assert not list(tmp_path.iterdir())


def test_without_refit(trip: Ride, data: Path, tmp_path: Path) -> None:
    settings = on_one_thread(KeepMacs(0.5), calibration=data / "calibration.npz", refit=False)
    made = ride(narrow(), tmp_path, settings)
    assert made.plan.fit == CALIBRATED
    assert error_of(trip) <= error_of(made)
    apply(made.source, made.plan, tmp_path / "again.onnx", calibration=data / "calibration.npz")
    assert (tmp_path / "again.onnx").read_bytes() == made.out.read_bytes()


def test_the_error_stays_within_its_limit(data: Path, tmp_path: Path) -> None:
    made = ride(narrow(), tmp_path, on_one_thread(MaxError(0.1), calibration=data / "calibration.npz"))
    goal = made.report.goal
    assert goal.reached
    assert float(str(made.report.fidelity["relative_error"])) <= 0.1
    assert made.report.factorized or "kept" in goal.reason


def test_a_drop_is_told_as_measured_on_other_samples(data: Path, tmp_path: Path) -> None:
    settings = on_one_thread(MaxDrop(0.05), calibration=data / "calibration.npz", eval=data / "labelled.npz")
    made = ride(narrow(), tmp_path, settings)
    accuracy = made.report.accuracy
    assert accuracy is not None
    assert (accuracy.samples, accuracy.before) == (48, 1.0)
    assert accuracy.after >= 0.85  # of 48 samples the two standard errors of a drop of 0.05 are 0.06
    assert made.report.goal.reached == (accuracy.before - accuracy.after <= 0.05)
    assert "on 48 other samples" in made.report.goal.reason


def test_a_model_that_cannot_be_cut_is_treated_without_samples_and_it_is_said(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32))
    made = ride(sequences(64), tmp_path, on_one_thread(KeepMacs(0.5), calibration=tmp_path / "x.npz"))
    assert made.plan.fit == DATA_FREE
    wanted = "no calibration: 'parts' holds a list, not an array of numbers would have to be carried along"
    assert any(wanted == note for note in made.report.notes)
    apply(made.source, made.plan, tmp_path / "again.onnx", calibration=tmp_path / "x.npz")
    assert (tmp_path / "again.onnx").read_bytes() == made.out.read_bytes()


def test_losses_are_probed_where_every_layer_is_shared(tmp_path: Path) -> None:
    """The walk stops nowhere: the outputs depend on the layers all the same."""
    nodes = [node("MatMul", "x w", "a", "one"), node("Relu", "a", "b"), node("MatMul", "b w", "y", "two")]
    weights = {"w": low_rank((96, 96), 4, 0, noise=0.3)}
    proto = model(nodes, [value("x", ["rows", 96])], [value("y", ["rows", 96])], weights)
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).standard_normal((64, 7, 96)).astype(np.float32))
    made = ride(proto, tmp_path, on_one_thread(KeepMacs(0.5), calibration=tmp_path / "x.npz"))
    loss = made.report.layers[0].predicted_loss
    assert loss is not None
    assert loss > 1e-3
    assert made.plan.layers[0].rank > (4,)


def test_whole_numbers_fed_and_an_input_that_never_changes(tmp_path: Path) -> None:
    np.savez(tmp_path / "ids.npz", ids=np.random.default_rng(0).integers(0, 20, (48, 7)))
    source = save(embedding(), tmp_path)
    report, plan = optimize(
        source, tmp_path / "out.onnx", on_one_thread(KeepMacs(0.6), calibration=tmp_path / "ids.npz")
    )
    assert plan.fit == REFIT
    assert report.calibration.startswith("calibrated on")
