"""compare: formats beside each other within the same budgets, measured, and what the user reads of it."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import run_model
from rich.console import Console
from roads import macs, network, on_one_thread, parameter_count, perceptron, save

from onnx_lowrank.cli import run
from onnx_lowrank.comparison import Comparison, compare, render
from onnx_lowrank.comparison.networks import teams_of
from onnx_lowrank.goals import KeepMacs, Speedup
from onnx_lowrank.latency.child import MeasuringError
from onnx_lowrank.layer import LayerShape
from onnx_lowrank.passes.decompose import decompositions
from onnx_lowrank.recipe import parse_passes
from onnx_lowrank.search.racer import Racer

pytestmark = pytest.mark.usefixtures("quick")
Captured = pytest.CaptureFixture[str]
FORMATS = "svd,cp_spatial{restarts=0,sweeps=3}"
GOALS = (KeepMacs(0.5), Speedup(1.2))
IMAGE = {"image": (1, 3, 16, 16)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("compare")
    images = np.random.default_rng(0).standard_normal((64, 3, 16, 16)).astype(np.float32)
    labels = run_model(network(), {"image": images})[0].argmax(axis=1)
    np.savez(made / "labelled.npz", image=images, label=labels)
    (made / "models").mkdir()
    return made


@pytest.fixture(scope="module")
def found(folder: Path, quick: None) -> Comparison:
    settings = on_one_thread(eval=folder / "labelled.npz", passes=tuple(parse_passes(FORMATS)), keep=("stem",))
    return compare(save(network(), folder), GOALS, settings, models=folder / "models")


def test_every_format_is_there_at_every_budget_or_says_why_not(found: Comparison) -> None:
    assert [layer.name for layer in found.layers] == ["body/1", "body/2", "head"]
    for layer in found.layers:
        for budget in found.budgets:
            there = {row.format for row in layer.contenders if row.budget == str(budget)}
            assert there | set(layer.refusals) == {"svd", "cp_spatial"}
            assert not there & set(layer.refusals)
        assert all(bool(row.rank) != bool(row.reason) for row in layer.contenders)
    assert (
        found.layers[2].refusals["cp_spatial"] == "64->10 has no kernel: svd reaches the same error with fewer stages"
    )


def test_layers_keep_within_the_budget_and_their_figures_are_the_chains(found: Comparison) -> None:
    methods = decompositions()
    shapes = {"body/1": (64, 32, 3, 3), "body/2": (64, 64, 3, 3), "head": (10, 64)}
    for layer in found.layers:
        assert layer.params == np.prod(shapes[layer.name])
        rows = [row for row in layer.contenders if row.rank]
        assert rows
        for row in rows:
            out, in_, *kernel = shapes[layer.name]
            made = methods[row.format].chain(LayerShape(1, out, in_, tuple(kernel)), row.rank)
            assert row.params == made.params
            assert row.ms is not None
            assert row.of_layer is not None
            assert row.ci95 is not None
            assert row.ci95[0] <= row.of_layer <= row.ci95[1]
            assert row.macs is not None
            assert row.budget != "keep-macs 0.5" or row.macs <= 0.5 * layer.macs
            assert row.beyond == (row.budget != "keep-macs 0.5" and row.of_layer > 1 / 1.2)


def test_networks_are_the_files_that_were_kept(found: Comparison, folder: Path) -> None:
    labelled = np.load(folder / "labelled.npz")
    built = [row for row in found.networks if row.file is not None]
    assert {row.name for row in found.networks} == {"svd", "cp_spatial", "all"}
    assert {Path(row.file or "").name for row in built} == {p.name for p in (folder / "models").iterdir()}
    assert found.macs == pytest.approx(macs(network(), IMAGE))
    for row in built:
        model = onnx.load(row.file or "")
        onnx.checker.check_model(model, full_check=True)
        assert row.params == parameter_count(model)
        assert row.macs == pytest.approx(macs(model, IMAGE))
        assert set(row.used) <= set(row.formats)
        assert row.accuracy is not None
        logits = run_model(model, {"image": labelled["image"]})[0]
        assert row.accuracy.after == pytest.approx(float((logits.argmax(axis=1) == labelled["label"]).mean()))
        assert row.accuracy.before == 1.0
        assert row.macs is not None
        assert row.budget != "keep-macs 0.5" or row.macs <= 0.5 * found.macs
    assert any(row.reached for row in built if row.budget == "keep-macs 0.5")


def test_mixed_formats_reach_the_budget_and_an_equal_choice_is_the_same_network(found: Comparison) -> None:
    rows = {row.name: row for row in found.networks if row.budget == "keep-macs 0.5"}
    assert rows["all"].formats == ("svd", "cp_spatial")
    assert all(row.reached for row in rows.values())
    if rows["all"].same_as:
        other = rows[rows["all"].same_as]
        assert replace(rows["all"], name=other.name, formats=other.formats, same_as="", seconds=other.seconds) == other


def test_with_samples_errors_are_of_outputs_and_networks_are_refitted(folder: Path) -> None:
    x = np.random.default_rng(0).standard_normal((160, 8)) @ np.random.default_rng(1).standard_normal((8, 128))
    np.savez(folder / "x.npz", x=x.astype(np.float32))
    path, passes = save(perceptron(), folder, "perceptron.onnx"), tuple(parse_passes("svd"))
    given, free = (
        compare(path, [KeepMacs(0.05)], on_one_thread(passes=passes, calibration=data, samples=64))
        for data in (folder / "x.npz", None)
    )
    assert ({layer.metric for layer in given.layers}, {layer.metric for layer in free.layers}) == (
        {"outputs"},
        {"weight"},
    )
    assert [row.rank for layer in given.layers for row in layer.contenders] == [(2,), (2,)]
    for one, told in ((given, True), (free, False)):
        console = Console(file=io.StringIO(), width=400)
        render(one, console)
        assert ("their errors are on the samples they were fitted to" in console.file.getvalue()) == told  # pyright: ignore[reportAttributeAccessIssue] - a StringIO
    assert given.data == "calibrated on 56 samples; errors of networks on 8 held-out samples"
    assert free.data == "data-free; errors of networks on synthetic inputs"
    errors = [row.networks[0].relative_error for row in (given, free)]
    assert errors[0] is not None
    assert errors[1] is not None
    assert errors[0] < errors[1]


def test_a_network_that_cannot_be_measured_costs_its_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Racer.best_level

    def best(self: Racer, path: Path) -> object:
        if "_svd_input" in path.name:
            raise MeasuringError("died of signal 11", 0)
        return real(self, path)

    monkeypatch.setattr(Racer, "best_level", best)
    settings = on_one_thread(passes=tuple(parse_passes("svd,svd_input,cp_spatial")))
    found = compare(save(network(), folder, "dies.onnx"), GOALS[:1], settings)
    rows = {row.name: row for row in found.networks}
    assert not rows["svd_input"].reached
    assert rows["svd_input"].reason == "its network failed: the measuring process died of signal 11"
    assert rows["svd"].relative_error is not None


def test_a_time_limit_ends_it(folder: Path) -> None:
    settings = on_one_thread(passes=tuple(parse_passes("svd")), time_limit=1e-3)
    found = compare(save(network(), folder), [KeepMacs(0.5)], settings)
    assert [(row.name, row.reached, row.reason) for row in found.networks] == [
        ("svd", False, "not tried: --time-limit is over")
    ]
    assert all(row.rank for layer in found.layers for row in layer.contenders)


def test_a_budget_no_rank_reaches_says_how_near_it_came(folder: Path) -> None:
    path = save(perceptron(), folder, "perceptron.onnx")
    found = compare(path, [KeepMacs(0.001)], on_one_thread(passes=tuple(parse_passes("svd,cp_spatial"))))
    assert {row.name: row.reason for row in found.networks} == {
        "svd": "not reached: at least 0.016 of the MACs remain",
        "cp_spatial": "it takes no layer",
        "all": "not reached: at least 0.016 of the MACs remain",
    }
    reasons = {row.reason for layer in found.layers for row in layer.contenders}
    assert reasons == {"not within it: 0.02 of the layer's MACs at rank 1"}


def test_teams() -> None:
    assert teams_of(["svd"]) == {"svd": ("svd",)}
    assert teams_of(["svd", "tucker2"]) == {"svd": ("svd",), "tucker2": ("tucker2",), "default": ("svd", "tucker2")}
    assert teams_of(["cp_spatial", "svd"]) == {
        "cp_spatial": ("cp_spatial",),
        "svd": ("svd",),
        "all": ("cp_spatial", "svd"),
    }


def test_the_command_prints_layers_and_networks(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    save(network(), tmp_path)
    words = ["compare", "model.onnx", "--passes", "svd,tucker2", "--threads", "1", "--keep-macs", "0.6"]
    assert run([*words, "-o", "found.json", "--only", "body/*", "--models", "kept"]) == 0
    text = capsys.readouterr().out
    raw = json.loads((tmp_path / "found.json").read_text())
    assert raw["schema"] == 1
    assert [(b["kind"], b["value"]) for b in raw["budgets"]] == [("keep-macs", 0.6)]
    assert "Layers at 0.6 of the MACs of each" in text
    assert "The network at 0.6 of the MACs" in text
    assert text.splitlines()[-1] == "written to found.json"
    (second,) = [layer for layer in raw["layers"] if layer["name"] == "body/2"]
    assert f"body/2  Conv 64->64 3x3, {second['ms']:.3g} ms, error of its weight" in text
    for row in second["contenders"]:
        (line,) = [x for x in text.splitlines() if x.startswith(row["format"]) and f" {row['error']:.3f} " in x][-1:]
        assert "x".join(map(str, row["rank"])) in line.split()
    files = {p.name for p in (tmp_path / "kept").iterdir()}
    assert files == {Path(row["file"]).name for row in raw["networks"]}
    assert {"keep-macs-0.6_svd.onnx", "keep-macs-0.6_tucker2.onnx"} <= files


def test_json_is_all_that_is_printed(folder: Path, capsys: Captured) -> None:
    words = ["compare", str(save(network(), folder)), "--passes", "svd", "--threads", "1", "--keep-params", "0.7"]
    assert run([*words, "--json"]) == 0
    raw = json.loads(capsys.readouterr().out)
    assert {row["budget"] for row in raw["networks"]} == {"keep-params 0.7"}
    (row,) = raw["networks"]
    assert row["params"] <= 0.7 * raw["params"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--keep-macs", "2"],
            "got --keep-macs 2; expected a number above 0, at most 1; give another value",
        ),
        (
            ["--speedup", "0.5"],
            "got --speedup 0.5; expected a number above 1; give another value",
        ),
        (
            ["--models", "model.onnx"],
            "got --models model.onnx, which is no folder; expected a folder; give another path",
        ),
        (
            ["-o", "model.onnx"],
            "got model.onnx to write to, the same file as model.onnx; expected a file of its own; choose another one",
        ),
        (
            ["--metric", "top1"],
            "got --metric without --eval; expected labelled samples to measure it on; "
            "give --eval, or leave --metric out",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured, options: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    save(network(), tmp_path)
    assert run(["compare", "model.onnx", *options]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize(
    ("name", "external", "fault"),
    [
        ("keep-macs-0.5_svd.onnx", False, "to write to, the same file as"),
        ("keep-macs-0.5_all.onnx", False, "to write to, the same file as"),
        ("keep-macs-0.5_svd.onnx.data", True, "whose weights would replace"),
    ],
)
def test_kept_networks_never_take_the_place_of_an_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured, name: str, *, external: bool, fault: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if external:
        onnx.save(perceptron(), "model.onnx", save_as_external_data=True, location=name, size_threshold=64)
    else:
        save(perceptron(), tmp_path, name)
    given = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    words = ["compare", "model.onnx" if external else name, "--passes", "svd,cp_spatial", "--keep-macs", "0.5"]
    assert run([*words, "--threads", "1", "--models", "."]) == 2
    assert fault in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == given


def test_the_json_is_the_dataclass(found: Comparison) -> None:
    assert json.loads(found.to_json()) == json.loads(json.dumps(asdict(found)))
