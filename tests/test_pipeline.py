"""The whole road on small models: what goes in, what comes out, and whether the report tells the truth about it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import run_model, worst_error
from onnx import ModelProto, numpy_helper
from roads import (
    Ride,
    macs,
    network,
    node,
    on_one_thread,
    parameter_count,
    perceptron,
    ride,
    save,
    weight_bearing,
)

from onnx_lowrank.errors import InputError, InvalidResultError
from onnx_lowrank.goals import KeepMacs, KeepParams, LatencyMs, MaxError, Speedup
from onnx_lowrank.output import publish
from onnx_lowrank.pipeline import apply, optimize, plan
from onnx_lowrank.plan import PassSpec, Plan
from onnx_lowrank.report.model import Report
from onnx_lowrank.signature import signature_of
from onnx_lowrank.target import InputShapes

pytestmark = pytest.mark.usefixtures("quick")
IMAGES = {"image": np.random.default_rng(0).standard_normal((3, 3, 16, 16)).astype(np.float32)}


def decisions(report: Report) -> dict[str, str]:
    return {row.name: row.decision for row in report.layers}


GOALS = [Speedup(1.05), LatencyMs(1000.0), MaxError(0.05), KeepMacs(0.5), KeepParams(0.5)]


@pytest.fixture(scope="module", params=GOALS, ids=lambda goal: goal.kind)
def trip(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, quick: None) -> Ride:
    """The network, optimized for every kind of goal."""
    return ride(network(), tmp_path_factory.mktemp("trip"), on_one_thread(request.param))


def test_the_signature_never_changes_and_the_checker_passes(trip: Ride) -> None:
    onnx.checker.check_model(str(trip.out), full_check=True)
    assert signature_of(trip.result) == signature_of(onnx.load(trip.source))
    assert [d.dim_param for d in trip.result.graph.output[1].type.tensor_type.shape.dim] == ["batch", "batch"]


def test_outputs_stay_close_at_any_batch_size(trip: Ride) -> None:
    expected, got = (run_model(onnx.load(path), IMAGES) for path in (trip.source, trip.out))
    assert [a.shape for a in got] == [a.shape for a in expected]
    assert worst_error(expected, got) < 0.5
    assert trip.report.fidelity["relative_error"] < 0.5


def test_every_weight_bearing_node_has_a_decision_and_a_reason(trip: Ride) -> None:
    assert sorted(decisions(trip.report)) == sorted(weight_bearing(network()))
    assert all(len(row.reason.split()) > 2 for row in trip.report.layers)
    by_name = {row.name: row for row in trip.report.layers}
    assert by_name["depthwise"].decision == by_name["gram"].decision == "kept"
    written = {n.name for n in trip.result.graph.node}
    for row in trip.report.layers:
        rewritten = row.decision == "factorized"
        assert (row.name in written) != rewritten
        assert (row.rank != ()) == rewritten
        assert (row.params_after < row.params_before) == rewritten


def test_plan_and_apply_write_the_same_bytes_again(trip: Ride, tmp_path: Path) -> None:
    made = Plan.from_json(trip.plan.to_json())
    for name in ("one.onnx", "two.onnx"):
        apply(trip.source, made, tmp_path / name)
        assert (tmp_path / name).read_bytes() == trip.out.read_bytes()


def test_the_size_told_is_the_size_on_disk(trip: Ride) -> None:
    size, shapes = trip.report.size, {"image": (1, 3, 16, 16)}
    before = onnx.load(trip.source)
    assert (size.params_before, size.params_after) == (parameter_count(before), parameter_count(trip.result))
    assert (size.macs_before, size.macs_after) == (macs(before, shapes), macs(trip.result, shapes))
    assert (size.bytes_before, size.bytes_after) == (trip.source.stat().st_size, trip.out.stat().st_size)


def test_a_goal_that_is_said_to_be_reached_is_reached(trip: Ride) -> None:
    goal, size, latency = trip.report.goal, trip.report.size, trip.report.latency
    assert latency is not None
    match goal.kind:
        case "keep-macs":
            assert goal.reached
            assert size.macs_after <= goal.value * size.macs_before
        case "keep-params":
            assert goal.reached
            assert size.params_after <= goal.value * size.params_before
        case "max-error":
            assert goal.reached
            assert trip.report.fidelity["relative_error"] <= goal.value
        case "speedup":
            assert goal.reached == (latency.ci95[0] >= 0.98 * goal.value)
        case _:
            assert goal.reached


def test_report_json_holds_every_field_of_the_schema(trip: Ride, tmp_path: Path) -> None:
    raw = json.loads(trip.report.write(tmp_path / "report").read_text())
    assert raw["schema"] == 1
    top = "model target goal layers latency fidelity accuracy training size timings peak_rss_mib dropped environment"
    assert set(top.split()) <= raw.keys()
    assert {"kind", "value", "reached"} <= raw["goal"].keys()
    layer = (
        "name op shape decision method rank reason error error_refit predicted_loss params_before params_after "
        "macs_before macs_after latency_ms_before latency_ms_after source"
    )
    assert all(set(layer.split()) <= row.keys() for row in raw["layers"])
    assert {row["decision"] for row in raw["layers"]} <= {"factorized", "kept"}
    assert all(row["source"] == (None if row["latency_ms_before"] is None else "measured") for row in raw["layers"])
    times = "before_ms normalized_ms after_ms predicted_ms speedup low_rank_speedup ci95 samples disturbed"
    assert set(times.split()) <= raw["latency"].keys()
    assert {"relative_error", "cosine", "kl", "top1_agreement", "samples", "data"} <= raw["fidelity"].keys()
    assert raw["fidelity"]["data"] == "synthetic"
    sizes = {f"{what}_{when}" for what in ("params", "macs", "bytes") for when in ("before", "after")}
    assert sizes <= raw["size"].keys()
    assert {"versions", "cpu", "provider_options"} <= raw["environment"].keys()
    assert all(seconds >= 0 for seconds in raw["timings"].values())
    assert raw["model"]["sha256"] == trip.plan.model_sha256
    assert (raw["accuracy"], raw["training"]) == (None, "none")


def test_a_warm_table_times_no_chain(tmp_path: Path) -> None:
    settings = on_one_thread(KeepParams(0.5))
    first = ride(network(), tmp_path, settings)
    again, _ = optimize(first.source, tmp_path / "again.onnx", settings)
    assert again.chains_timed == 0
    assert (tmp_path / "again.onnx").read_bytes() == first.out.read_bytes()


@pytest.mark.parametrize("allocator", ["energy", "minimax"])
def test_other_rules_reach_the_share_too(allocator: str, tmp_path: Path) -> None:
    made = ride(network(), tmp_path, on_one_thread(KeepMacs(0.5), allocator=allocator))
    assert made.report.goal.reached
    assert made.report.size.macs_after <= 0.5 * made.report.size.macs_before


def test_share_of_the_factorable_layers_is_stricter(tmp_path: Path) -> None:
    made = ride(network(), tmp_path, on_one_thread(KeepMacs(0.4), of="factorable"))
    rows = [row for row in made.report.layers if row.latency_ms_before is not None]
    assert made.report.goal.reached
    assert sum(row.macs_after for row in rows) <= 0.4 * sum(row.macs_before for row in rows)


def test_a_share_out_of_reach_gives_the_smallest_and_says_so(tmp_path: Path) -> None:
    made = ride(network(), tmp_path, on_one_thread(KeepParams(0.01)))
    assert not made.report.goal.reached
    assert made.report.factorized >= 2
    assert made.out.exists()


def test_an_impossible_speed_gives_the_best_found_and_says_so(tmp_path: Path) -> None:
    made = ride(network(), tmp_path, on_one_thread(Speedup(1000)))
    assert not made.report.goal.reached
    assert "best found" in made.report.goal.reason
    assert made.out.exists()


def test_plan_writes_no_model_and_apply_realises_it(tmp_path: Path) -> None:
    source = save(network(), tmp_path)
    outcome = plan(source, on_one_thread(KeepParams(0.5)))
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    apply(source, outcome.best.plan, tmp_path / "out.onnx")
    assert parameter_count(onnx.load(tmp_path / "out.onnx")) <= 0.5 * parameter_count(network())


def test_a_plan_for_another_model_is_refused_unless_forced(tmp_path: Path) -> None:
    source = save(network(), tmp_path)
    made = plan(source, on_one_thread(KeepParams(0.5))).best.plan
    other = network()
    other.doc_string = "retrained"
    retrained = save(other, tmp_path, "other.onnx")
    with pytest.raises(InputError) as caught:
        apply(retrained, made, tmp_path / "out.onnx")
    assert str(caught.value).endswith(
        f"for a plan made with model {made.model_sha256[:12]}; expected the model the plan was made with; "
        "make the plan again, or use --force"
    )
    assert not (tmp_path / "out.onnx").exists()
    apply(retrained, made, tmp_path / "out.onnx", force=True)
    assert onnx.load(tmp_path / "out.onnx").doc_string == "retrained"


def test_options_of_a_decomposition_travel_with_the_plan(tmp_path: Path) -> None:
    options = (PassSpec("tucker2", {"sweeps": "0"}),)
    trip = ride(network(), tmp_path, dataclasses.replace(on_one_thread(KeepParams(0.6)), passes=options))
    assert PassSpec("tucker2", {"sweeps": 0}) in trip.plan.passes
    apply(trip.source, Plan.from_json(trip.plan.to_json()), tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == trip.out.read_bytes()


def test_external_weights_are_never_overwritten(tmp_path: Path) -> None:
    source = save(network(), tmp_path)
    proto = onnx.load(source)
    onnx.save(proto, source, save_as_external_data=True, location="weights.bin", size_threshold=0)
    before = (tmp_path / "weights.bin").read_bytes()
    message = (
        f"got {tmp_path / 'weights.bin'}, which holds weights of the model; "
        "expected a file the model is not read from; rename it"
    )
    for beside, out in (((), "weights.bin"), ((tmp_path / "weights.bin",), "out.onnx")):
        with pytest.raises(InputError) as caught:
            optimize(source, tmp_path / out, on_one_thread(KeepParams(0.6)), beside=beside)
        assert str(caught.value) == message
    assert (tmp_path / "weights.bin").read_bytes() == before


def test_patterns_that_match_nothing_are_refused(tmp_path: Path) -> None:
    source = save(network(), tmp_path)
    with pytest.raises(InputError) as caught:
        optimize(source, tmp_path / "out.onnx", on_one_thread(KeepParams(0.6), keep=("nosuch*",)))
    assert str(caught.value) == (
        "got --keep nosuch*, which matches no weight-bearing node; expected a pattern that matches one; "
        "list them with `onnx-lowrank inspect`"
    )


def test_outputs_that_would_destroy_something_are_refused(tmp_path: Path) -> None:
    source = save(perceptron(), tmp_path)
    link = tmp_path / "link.onnx"
    link.symlink_to(source)
    before = source.read_bytes()
    for out, message in [
        (
            link,
            f"got {link} to write to, the same file as {source}; expected a file of its own; choose another one",
        ),
        (tmp_path, f"got the folder {tmp_path} as output; expected a file name; write to {tmp_path / 'model.onnx'}"),
        (
            tmp_path / "no" / "out.onnx",
            f"got output in {tmp_path / 'no'}, which is no folder; expected an existing folder; make it first",
        ),
    ]:
        with pytest.raises(InputError) as caught:
            optimize(source, out, on_one_thread())
        assert str(caught.value) == message
    assert source.read_bytes() == before


def test_a_time_limit_still_ends_with_a_model(tmp_path: Path) -> None:
    made = ride(network(), tmp_path, on_one_thread(Speedup(1.5), time_limit=0.01))
    onnx.checker.check_model(str(made.out), full_check=True)


def overflowing() -> ModelProto:
    """Means of numbers near the largest float32: finite, but their singular direction sums them up before it weighs."""
    proto = perceptron()
    for tensor in proto.graph.initializer:
        mean = 0.5 / 128 + 0.01 * numpy_helper.to_array(tensor) / 128
        tensor.CopyFrom(numpy_helper.from_array(mean, tensor.name))
    proto.graph.initializer.append(numpy_helper.from_array(np.array(3e38, np.float32), "loud"))
    proto.graph.node[0].input[0] = "h0"
    proto.graph.node.insert(0, node("Clip", "x loud loud", "h0"))
    return proto


def test_what_overflows_when_factorized_is_kept(tmp_path: Path) -> None:
    made = ride(overflowing(), tmp_path, on_one_thread(KeepParams(0.5)))
    assert made.report.factorized == 0
    assert all(choice.keeps for choice in made.plan.layers)
    assert not made.report.goal.reached
    why = r"; factorized, \d+ NaN or infinite values in output 'y' of out.onnx: the original is written as it is"
    assert re.search(why, made.report.goal.reason)
    x = {"x": np.ones((2, 128), np.float32)}
    expected, got = (run_model(onnx.load(path), x) for path in (made.source, made.out))
    assert np.array_equal(expected[0], got[0])
    assert made.out.read_bytes() == made.source.read_bytes()
    apply(made.source, made.plan, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == made.source.read_bytes()


def test_apply_writes_nothing_that_gives_new_infinities(tmp_path: Path) -> None:
    source = save(overflowing(), tmp_path)
    quiet = save(perceptron(), tmp_path, "quiet.onnx")
    made = plan(quiet, on_one_thread(KeepParams(0.5))).best.plan
    with pytest.raises(InvalidResultError, match=r"got \d+ NaN or infinite values in output 'y' of out.onnx; expected"):
        apply(source, made, tmp_path / "out.onnx", force=True)
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "quiet.onnx"}


def test_apply_says_when_the_original_does_not_run_on_drawn_inputs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    proto = perceptron()
    proto.graph.initializer.append(numpy_helper.from_array(np.array([7, 128]), "rows"))
    proto.graph.node[0].input[0] = "seven"
    proto.graph.node.insert(0, node("Reshape", "x rows", "seven"))
    source = save(proto, tmp_path)
    made = plan(source, on_one_thread(KeepParams(0.5), shapes=[InputShapes({"x": (7, 128)})])).best.plan
    apply(source, made, tmp_path / "out.onnx")
    assert "the result was not run: the original gives no outputs either" in caplog.text
    assert (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("external", [False, True])
def test_publishing_is_not_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, external: bool) -> None:
    """The signal comes between the moves: all files are moved before it is heeded."""
    heeded: list[tuple[int, set[str]]] = []

    def heed(number: int) -> None:
        heeded.append((number, {path.name for path in tmp_path.iterdir()}))

    monkeypatch.setattr(signal, "raise_signal", heed)
    staged = tmp_path / "staged"
    staged.mkdir()
    names = ["out.onnx", "out.onnx.data"] if external else ["out.onnx"]
    for name in names:
        (staged / name).write_bytes(b"new")
    move = Path.replace

    def interrupted(self: Path, target: Path) -> Path:
        os.kill(os.getpid(), signal.SIGINT)
        return move(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    publish(staged / "out.onnx", tmp_path / "out.onnx")
    assert heeded == [(signal.SIGINT, {*names, "staged"})]
