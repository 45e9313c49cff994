"""The whole road on small models: what goes in, what comes out, and whether the report tells the truth about it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builders import model, run_model, value, worst_error
from onnx import ModelProto, TensorProto, shape_inference
from roads import (
    bodies,
    low_rank,
    network,
    node,
    on_one_thread,
    parameter_count,
    perceptron,
    save,
    save_external,
    shared,
    weight_bearing,
)

from onnx_lowrank.errors import InputError
from onnx_lowrank.goals import KeepMacs, KeepParams, LatencyMs, MaxError, Speedup
from onnx_lowrank.pipeline import apply, optimize, plan
from onnx_lowrank.plan import PassSpec, Plan
from onnx_lowrank.report.model import Report
from onnx_lowrank.settings import Settings
from onnx_lowrank.signature import signature_of
from onnx_lowrank.target import InputShapes

pytestmark = pytest.mark.usefixtures("quick")
IMAGES = {"image": np.random.default_rng(0).standard_normal((3, 3, 16, 16)).astype(np.float32)}


@dataclass(frozen=True, eq=False)
class Ride:
    """One trip down the road."""

    source: Path
    out: Path
    report: Report
    plan: Plan

    @property
    def result(self) -> ModelProto:
        return onnx.load(self.out)


def ride(proto: ModelProto, folder: Path, settings: Settings, *, external: bool = False) -> Ride:
    source = save_external(proto, folder) if external else save(proto, folder)
    out = folder / "out.onnx"
    return Ride(source, out, *optimize(source, out, settings))


def decisions(report: Report) -> dict[str, str]:
    return {row.name: row.decision for row in report.layers}


def macs(proto: ModelProto, shapes: dict[str, tuple[int, ...]]) -> float:
    """Multiply-accumulates, from inferred shapes and attributes alone."""
    fixed = ModelProto()
    fixed.CopyFrom(proto)
    for given in fixed.graph.input:
        for dim, size in zip(given.type.tensor_type.shape.dim, shapes[given.name], strict=True):
            dim.dim_value = size
    del fixed.graph.value_info[:]
    for result in fixed.graph.output:
        result.type.tensor_type.ClearField("shape")
    inferred = shape_inference.infer_shapes(fixed, data_prop=True).graph
    known = {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*inferred.value_info, *inferred.output)
    }
    known |= {name: list(shape) for name, shape in shapes.items()}
    known |= {tensor.name: list(tensor.dims) for tensor in proto.graph.initializer}
    total = 0.0
    for n in proto.graph.node:
        if n.op_type == "Conv":
            total += math.prod(known[n.output[0]]) * math.prod(known[n.input[1]][1:])
        elif n.op_type == "MatMul":
            total += math.prod(known[n.output[0]]) * known[n.input[0]][-1]
    return total


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
    assert {row["source"] for row in raw["layers"]} <= {"measured", "estimated"}
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


@pytest.mark.parametrize("build", [network, perceptron, shared], ids=lambda build: build.__name__)
def test_full_rank_reproduces_the_outputs(build: Callable[[], ModelProto], tmp_path: Path) -> None:
    made = ride(build(), tmp_path, on_one_thread(MaxError(0.01), allocator="full_rank"))
    assert made.report.factorized > 0
    first = made.result.graph.input[0]
    feeds = {first.name: np.ones([d.dim_value or 2 for d in first.type.tensor_type.shape.dim], np.float32)}
    assert worst_error(run_model(onnx.load(made.source), feeds), run_model(made.result, feeds)) < 1e-4
    assert made.report.fidelity["relative_error"] < 1e-4


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


@pytest.mark.parametrize(
    ("options", "free"),
    [({"only": ("body/*",)}, {"body/1", "body/2"}), ({"keep": ("body/2", "h*")}, {"stem", "body/1"})],
    ids=["only", "keep"],
)
def test_pinned_layers_stay_and_say_why(options: dict[str, tuple[str, ...]], free: set[str], tmp_path: Path) -> None:
    made = ride(network(), tmp_path, on_one_thread(KeepMacs(0.2), **options))
    changed = {name for name, decision in decisions(made.report).items() if decision == "factorized"}
    assert changed
    assert changed <= free
    reasons = {row.name: row.reason for row in made.report.layers}
    assert reasons["head"] == f"{'not named by --only body/*' if 'only' in options else 'pinned by --keep h*'}"


def test_several_shapes_of_one_input_count_by_their_weights(tmp_path: Path) -> None:
    entries = [InputShapes({"image": (batch, 3, 16, 16)}, weight) for batch, weight in ((1, 3.0), (4, 1.0))]
    made = ride(network(), tmp_path, on_one_thread(KeepMacs(0.6), shapes=entries))
    per_image = {batch: macs(onnx.load(made.source), {"image": (batch, 3, 16, 16)}) for batch in (1, 4)}
    assert made.report.size.macs_before == pytest.approx(0.75 * per_image[1] + 0.25 * per_image[4])
    assert made.report.size.macs_after <= 0.6 * made.report.size.macs_before


def test_chosen_methods_are_the_only_ones_used(tmp_path: Path) -> None:
    made = ride(network(), tmp_path, on_one_thread(KeepMacs(0.5), passes=(PassSpec("tucker2"),)))
    assert {row.method for row in made.report.layers if row.decision == "factorized"} == {"tucker2"}


def test_given_data_and_labels_are_reported(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    images = rng.standard_normal((12, 3, 16, 16)).astype(np.float32)
    labels = run_model(network(), {"image": images})[0].argmax(axis=1)
    np.savez(tmp_path / "c.npz", image=images[:6])
    np.savez(tmp_path / "e.npz", image=images, label=labels)
    files = {"calibration": tmp_path / "c.npz", "eval": tmp_path / "e.npz"}
    made = ride(network(), tmp_path, on_one_thread(KeepMacs(0.6), **files))
    assert (made.report.fidelity["data"], made.report.fidelity["samples"]) == ("held-out", 6)
    accuracy = made.report.accuracy
    assert accuracy is not None
    assert (accuracy.metric, accuracy.samples, accuracy.before) == ("top1", 12, 1.0)
    truth = run_model(made.result, {"image": images})[0].argmax(axis=1)
    assert accuracy.after == pytest.approx((truth == labels).mean())
    assert made.plan.data_sha256 is not None
    with pytest.raises(InputError, match=r"^got data none for a plan made with data [0-9a-f]{12};"):
        apply(made.source, made.plan, tmp_path / "again.onnx")
    apply(made.source, made.plan, tmp_path / "again.onnx", calibration=files["calibration"])
    assert (tmp_path / "again.onnx").read_bytes() == made.out.read_bytes()


def test_external_data_stay_external(tmp_path: Path) -> None:
    made = ride(network(), tmp_path, on_one_thread(KeepParams(0.5)), external=True)
    assert (tmp_path / "out.onnx.data").exists()
    assert made.out.stat().st_size < made.report.size.bytes_after < made.report.size.bytes_before
    onnx.checker.check_model(str(made.out), full_check=True)
    expected, got = (run_model(onnx.load(path), IMAGES) for path in (made.source, made.out))
    assert worst_error(expected, got) < 0.5
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "external.onnx",
        "out.onnx",
        "out.onnx.data",
        "weights.bin",
    ]


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16])
def test_element_types_are_written_back(kind: int, tmp_path: Path) -> None:
    made = ride(perceptron(kind), tmp_path, on_one_thread(KeepParams(0.5)))
    assert made.report.factorized == 2
    assert {tensor.data_type for tensor in made.result.graph.initializer} == {kind}
    assert signature_of(made.result) == signature_of(onnx.load(made.source))
    assert made.report.fidelity["relative_error"] < 0.1
    if kind == TensorProto.BFLOAT16:
        assert made.report.fidelity["engine"] == "onnx.reference"
        assert any("timed as float32" in note for note in made.report.notes)


def test_layers_in_bodies_are_factored_where_they_stand(tmp_path: Path) -> None:
    made = ride(bodies(), tmp_path, on_one_thread(KeepParams(0.6)))
    rows = {row.name: row for row in made.report.layers}
    assert set(rows) == {"then", "else", "step"}
    assert sum(row.decision == "factorized" for row in rows.values()) >= 1
    width = 96
    assert rows["step"].macs_before == 3 * rows["step"].params_before
    for flag in (True, False):
        feeds = {"x": np.random.default_rng(2).standard_normal((2, width)).astype(np.float32), "flag": np.array(flag)}
        assert worst_error(run_model(onnx.load(made.source), feeds), run_model(made.result, feeds)) < 0.3


def test_shared_weights_stay_shared(tmp_path: Path) -> None:
    made = ride(shared(), tmp_path, on_one_thread(KeepParams(0.5)))
    rows = {row.name: row for row in made.report.layers}
    assert set(rows) == {"one", "two", "three", "other"}
    assert {rows[name].decision for name in ("one", "two", "three")} == {"factorized"}
    assert "weight shared by 3 nodes" in rows["two"].reason
    readers = [n.input[1] for n in made.result.graph.node if n.name.startswith("two/")]
    assert readers == [n.input[1] for n in made.result.graph.node if n.name.startswith("three/")]
    assert made.report.size.params_after == parameter_count(made.result)


def test_bisect_names_the_first_rewrite_beyond_the_tolerance(tmp_path: Path) -> None:
    made = ride(network(), tmp_path, on_one_thread(KeepParams(0.3), bisect=True))
    blame = made.report.bisect
    assert blame is not None
    assert blame.tolerance == 0.01
    assert blame.error_before <= 0.01 < blame.error_after
    assert blame.node in {row.name for row in made.report.layers if row.decision == "factorized"}


@pytest.mark.parametrize(
    ("options", "reached"),
    [
        ({}, True),
        ({"goal": Speedup(2)}, False),
        ({"goal": KeepMacs(0.5)}, False),
        ({"goal": KeepParams(0.5), "of": "factorable"}, False),
        ({"allocator": "energy"}, True),
        ({"allocator": "full_rank"}, True),
    ],
    ids=str,
)
def test_nothing_to_factor_is_kept_with_a_reason(options: dict[str, Any], reached: bool, tmp_path: Path) -> None:
    nodes = [node("MatMul", "x x", "y", "square")]
    proto = model(nodes, [value("x", [4, 4])], [value("y", [4, 4])], {"unread": low_rank((2, 2), 1, 0)})
    made = ride(proto, tmp_path, on_one_thread(**options))
    assert [(row.name, row.decision) for row in made.report.layers] == [("square", "kept")]
    assert made.report.goal.reached == reached
    assert made.plan.layers == ()


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


def test_a_plan_with_a_decomposition_among_its_graph_passes_is_refused(tmp_path: Path) -> None:
    source = save(network(), tmp_path)
    made = plan(source, on_one_thread(KeepParams(0.9))).best.plan
    wrong = dataclasses.replace(made, passes=(PassSpec("svd"),))
    with pytest.raises(InputError) as caught:
        apply(source, wrong, tmp_path / "out.onnx")
    assert str(caught.value) == "got svd among the plan's graph passes; expected graph passes only; correct the plan"


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
