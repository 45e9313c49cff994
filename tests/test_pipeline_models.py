"""The whole road on models as they come: types, bodies, shared and external weights, data; and with options."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builders import model, run_model, value, worst_error
from onnx import ModelProto, TensorProto
from roads import (
    bodies,
    low_rank,
    macs,
    network,
    node,
    on_one_thread,
    parameter_count,
    perceptron,
    ride,
    shared,
)

from onnx_lowrank.errors import InputError
from onnx_lowrank.goals import KeepMacs, KeepParams, MaxError, Speedup
from onnx_lowrank.pipeline import apply
from onnx_lowrank.plan import PassSpec
from onnx_lowrank.signature import signature_of
from onnx_lowrank.target import InputShapes

pytestmark = pytest.mark.usefixtures("quick")
IMAGES = {"image": np.random.default_rng(0).standard_normal((3, 3, 16, 16)).astype(np.float32)}


@pytest.mark.parametrize("build", [network, perceptron, shared], ids=lambda build: build.__name__)
def test_full_rank_reproduces_the_outputs(build: Callable[[], ModelProto], tmp_path: Path) -> None:
    made = ride(build(), tmp_path, on_one_thread(MaxError(0.01), allocator="full_rank"))
    assert made.report.factorized > 0
    first = made.result.graph.input[0]
    feeds = {first.name: np.ones([d.dim_value or 2 for d in first.type.tensor_type.shape.dim], np.float32)}
    assert worst_error(run_model(onnx.load(made.source), feeds), run_model(made.result, feeds)) < 1e-4
    assert made.report.fidelity["relative_error"] < 1e-4


@pytest.mark.parametrize(
    ("options", "free"),
    [({"only": ("body/*",)}, {"body/1", "body/2"}), ({"keep": ("body/2", "h*")}, {"stem", "body/1"})],
    ids=["only", "keep"],
)
def test_pinned_layers_stay_and_say_why(options: dict[str, Any], free: set[str], tmp_path: Path) -> None:
    made = ride(network(), tmp_path, on_one_thread(KeepMacs(0.2), **options))
    changed = {row.name for row in made.report.layers if row.decision == "factorized"}
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
    np.savez(tmp_path / "c.npz", image=rng.standard_normal((6, 3, 16, 16)).astype(np.float32))
    np.savez(tmp_path / "e.npz", image=images, label=labels)
    files: dict[str, Any] = {"calibration": tmp_path / "c.npz", "eval": tmp_path / "e.npz"}
    made = ride(network(), tmp_path, on_one_thread(KeepMacs(0.6), **files))
    assert (made.report.fidelity["data"], made.report.fidelity["samples"]) == ("held-out", 1)
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
    made = ride(network(), tmp_path, on_one_thread(KeepParams(0.1), bisect=True))
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


def test_bisect_names_nothing_where_nothing_is_beyond_the_tolerance(tmp_path: Path) -> None:
    blame = ride(network(), tmp_path, on_one_thread(MaxError(0.5), bisect=True)).report.bisect
    assert blame is not None
    assert (blame.tolerance, blame.node, blame.rewrite, blame.error_before) == (0.5, None, "no rewrite", 0.0)
    assert blame.error_after <= 0.5
