"""The whole road with samples: nearer than without, the same again, and honest about what it did."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import model, run_model, value, worst_error
from rich.console import Console
from roads import Ride, low_rank, network, node, on_one_thread, ride, save
from walks import embedding, sequences

from onnx_lowrank.decomposition import Rank
from onnx_lowrank.errors import InputError, InvalidResultError
from onnx_lowrank.goals import DEFAULT_GOAL, KeepMacs, MaxDrop, MaxError
from onnx_lowrank.layer import Array
from onnx_lowrank.passes.decompose.two_stage import TwoStage
from onnx_lowrank.pipeline import apply, optimize
from onnx_lowrank.plan import CALIBRATED, DATA_FREE, REFIT, PassSpec
from onnx_lowrank.report.terminal import show
from onnx_lowrank.search import calibrated, error_search
from onnx_lowrank.search.source import SPLIT_SEED, read_source
from onnx_lowrank.target import Target
from onnx_lowrank.validation import compare

pytestmark = pytest.mark.usefixtures("quick")
ONE = Target(threads=1)


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


def shown(made: Ride) -> str:
    """The report as a wide terminal shows it."""
    text = io.StringIO()
    show(made.report, Console(file=text, width=1000, color_system=None))
    return text.getvalue()


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
    assert {"moments", "sensitivity", "refit"} <= report.timings.keys()
    rewritten = [row for row in report.layers if row.decision == "factorized"]
    assert rewritten
    for row in rewritten:
        assert row.error_refit is not None
        assert row.error_refit <= row.error
        assert "refitted: output error" in row.reason


def test_the_report_tells_where_samples_came_from_and_what_for(trip: Ride, data: Path) -> None:
    told = trip.report.samples
    assert told is not None
    assert told.origin == str(data / "calibration.npz")
    assert (told.fitted, told.judged, told.held_out) == (72, 12, 12)
    assert (told.sources, told.seed) == (None, SPLIT_SEED)
    # The strided convolution has 64 positions a sample, the others 256; of the stem, the narrowest, all are taken.
    assert told.positions["body/1"] == told.positions["body/2"] == 72 * 64
    assert told.positions["stem"] == 72 * 256
    assert set(told.positions) == {"stem", "body/1", "body/2", "head"}
    assert (
        f"samples from {data / 'calibration.npz'}: 72 fitted on, 12 judging, 12 held out; "
        "at most 18,432 positions a layer, drawn by a fixed seed"
    ) in shown(trip)


def test_sources_and_notes_of_labelled_samples_are_told(tmp_path: Path) -> None:
    proto = narrow()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    for output, size in zip(proto.graph.output, (4, 4), strict=True):
        output.type.tensor_type.shape.dim[0].dim_value = size
    proto.graph.output[1].type.tensor_type.shape.dim[1].dim_value = 4
    images = smooth(48, 0)
    np.savez(tmp_path / "c.npz", image=images, source=np.repeat(np.arange(12), 4))
    np.savez(tmp_path / "e.npz", image=images[:11], label=np.zeros(11, np.int64))
    settings = on_one_thread(KeepMacs(0.5), calibration=tmp_path / "c.npz", eval=tmp_path / "e.npz", refit=False)
    made = ride(proto, tmp_path, settings)
    assert made.report.samples is not None
    assert made.report.samples.sources == 12
    assert f"samples of 12 sources from {tmp_path / 'c.npz'}: " in shown(made)
    assert "--eval: 3 of 11 samples are not used: the model takes 4 at a time" in made.report.notes


def test_the_report_tells_how_well_predicted_and_measured_losses_agree(trip: Ride, data: Path, tmp_path: Path) -> None:
    """Compared are losses without refit, on the samples they were predicted from; `apply` writes such a model."""
    loss = trip.report.loss
    assert loss is not None
    assert loss.without_refit is not None
    assert loss.agreement == pytest.approx(loss.without_refit / loss.predicted)
    assert loss.predicted == pytest.approx(sum(row.predicted_loss or 0.0 for row in trip.report.layers))
    source = read_source(trip.source, data / "calibration.npz")
    assert source.samples is not None
    assert loss.judged_on == len(source.samples.judge)
    calibrated_only = replace(trip.plan, fit=CALIBRATED)
    apply(trip.source, calibrated_only, tmp_path / "plain.onnx", calibration=data / "calibration.npz")
    found = compare(trip.source, tmp_path / "plain.onnx", ONE, source.samples.judge)
    # A loss of 1e-5 is near the rounding errors of float32, and `apply` solves for one rank alone.
    assert loss.without_refit == pytest.approx(found.loss, rel=0.2)
    assert loss.measured == pytest.approx(compare(trip.source, trip.out, ONE, source.held_out).loss, rel=1e-3)
    line = (
        f"loss of the outputs {loss.predicted:.3g} predicted and {loss.without_refit:.3g} measured on the same "
        f"{loss.judged_on} samples, both without refit, {loss.agreement:.2g} times what was predicted; "
        f"{loss.measured:.3g} of the written model on {loss.samples} held-out samples"
    )
    assert line in shown(trip)


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


def test_losses_of_other_arrays_are_probed_again(
    trip: Ride, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed: list[float] = []
    loss, factors = calibrated.Probes.loss, TwoStage.factorize

    def counted(*words: Any) -> float:
        probed.append(loss(*words))
        return probed[-1]

    def rounded(self: TwoStage, weight: Array, gram: Array | None = None, *, most: Rank | None = None) -> Any:
        return factors(self, np.round(weight, 3), gram, most=most)

    monkeypatch.setattr(calibrated.Probes, "loss", counted)
    settings = on_one_thread(KeepMacs(0.5), calibration=data / "calibration.npz")
    optimize(trip.source, tmp_path / "again.onnx", settings)
    assert not probed
    monkeypatch.setattr(TwoStage, "factorize", rounded)  # as if the code had been edited
    optimize(trip.source, tmp_path / "other.onnx", settings)
    assert probed


def test_apply_writes_the_same_bytes_again(trip: Ride, data: Path, tmp_path: Path) -> None:
    for name in ("one.onnx", "two.onnx"):
        apply(trip.source, trip.plan, tmp_path / name, calibration=data / "calibration.npz")
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes() == trip.out.read_bytes()


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


def test_the_error_stays_within_its_limit(tmp_path: Path) -> None:
    np.savez(tmp_path / "many.npz", image=smooth(400, 0))  # the limit holds on others than those it was searched with
    made = ride(narrow(), tmp_path, on_one_thread(MaxError(0.1), calibration=tmp_path / "many.npz"))
    goal = made.report.goal
    assert goal.reached
    assert float(str(made.report.fidelity["relative_error"])) <= 0.1
    assert made.report.factorized or "kept" in goal.reason


def test_the_goal_that_nobody_stated_may_be_missed_and_a_limit_may_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large product of small rank, so that no noise of the machine hides what a chain saves."""
    weight = low_rank((1024, 1024), 32, seed=0, noise=0.04)
    large = model([node("MatMul", "x w", "y")], [value("x", ["N", 1024])], [value("y", ["N", 1024])], {"w": weight})
    samples = tmp_path / "calibration.npz"
    np.savez(samples, x=np.random.default_rng(0).standard_normal((96, 1024)).astype(np.float32))
    monkeypatch.setattr(error_search, "ERROR_AIM", 8.0)  # the samples that are held out say otherwise
    made = ride(large, tmp_path, on_one_thread(DEFAULT_GOAL, calibration=samples))
    error = float(str(made.report.fidelity["relative_error"]))
    assert error > DEFAULT_GOAL.value
    assert not made.report.goal.reached
    assert f"relative error {error:.3g}" in made.report.goal.reason
    limited = on_one_thread(MaxError(DEFAULT_GOAL.value), calibration=samples)
    with pytest.raises(InvalidResultError, match=r"expected at most 0\.01;"):
        optimize(made.source, tmp_path / "limited.onnx", limited)
    assert not (tmp_path / "limited.onnx").exists()


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
    for row in made.report.layers:
        assert f", weight error {row.error:.3g}; not calibrated: its weight is used by 2 nodes" in row.reason


def test_errors_of_calibrated_layers_are_called_those_of_outputs(tmp_path: Path) -> None:
    """Beside them one whose input is the same for all samples: its error is the weight's."""
    nodes = [
        node("MatMul", "x w", "a", "first"),
        node("MatMul", "places v", "b", "constant"),
        node("Add", "a b", "y"),
    ]
    weights = {name: low_rank((96, 96), 4, seed, noise=0.3) for seed, name in enumerate(("w", "v"))}
    steps = node("Sin", "steps", "places")
    weights["steps"] = np.linspace(0, 1, 96, dtype=np.float32)[None]
    proto = model([steps, *nodes], [value("x", ["rows", 96])], [value("y", ["rows", 96])], weights)
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).standard_normal((64, 96)).astype(np.float32))
    passes = (PassSpec("remove_identity"), PassSpec("svd"))  # nothing that folds constants
    made = ride(proto, tmp_path, on_one_thread(KeepMacs(0.5), calibration=tmp_path / "x.npz", passes=passes))
    first, constant = (row for row in made.report.layers if row.name in {"first", "constant"})
    assert ", output error " in first.reason
    assert "not calibrated" not in first.reason
    assert (
        f", weight error {constant.error:.3g}; not calibrated: its input is the same for all samples" in constant.reason
    )


def test_whole_numbers_fed_and_an_input_that_never_changes(tmp_path: Path) -> None:
    np.savez(tmp_path / "ids.npz", ids=np.random.default_rng(0).integers(0, 20, (48, 7)))
    source = save(embedding(), tmp_path)
    report, plan = optimize(
        source, tmp_path / "out.onnx", on_one_thread(KeepMacs(0.6), calibration=tmp_path / "ids.npz")
    )
    assert plan.fit == REFIT
    assert report.calibration.startswith("calibrated on")
