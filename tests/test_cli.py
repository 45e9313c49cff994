"""Every command from the outside: options in, exit code, files and text out."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builders import run_model
from rich.console import Console
from roads import network, perceptron, save, shared, weight_bearing

from onnx_lowrank import cli
from onnx_lowrank.cli import run
from onnx_lowrank.cli_options import given
from onnx_lowrank.display import phases_on
from onnx_lowrank.errors import InputError
from onnx_lowrank.goals import MaxError
from onnx_lowrank.plan import Plan
from onnx_lowrank.settings import Settings
from onnx_lowrank.target import Target

pytestmark = pytest.mark.usefixtures("quick")
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a model in it; terminals are wide."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    save(network(), tmp_path)
    return tmp_path


def optimize(*options: str) -> int:
    return run(["optimize", "model.onnx", "-o", "out.onnx", "--threads", "1", *options])


def parsed(capsys: Captured) -> Any:
    return json.loads(capsys.readouterr().out)


def test_optimize_writes_everything_it_is_asked_for(folder: Path, capsys: Captured) -> None:
    code = optimize("--keep-params", "0.5", "--plan-out", "plan.json", "--report", "told")
    text = capsys.readouterr().out
    assert code == 0
    assert "goal reached: keep-params 0.5" in text
    assert text.splitlines()[-1] == "written to out.onnx, report in told"
    onnx.checker.check_model(str(folder / "out.onnx"), full_check=True)
    raw = json.loads((folder / "told" / "report.json").read_text())
    assert (raw["goal"]["kind"], raw["goal"]["value"], raw["goal"]["reached"]) == ("keep-params", 0.5, True)
    made = Plan.read(folder / "plan.json")
    assert made.model_sha256 == raw["model"]["sha256"]
    assert sorted(p.name for p in folder.iterdir()) == ["model.onnx", "out.onnx", "plan.json", "told"]


def test_json_is_all_that_is_printed(folder: Path, capsys: Captured) -> None:
    assert optimize("--keep-macs", "0.6", "--json") == 0
    raw = parsed(capsys)
    assert raw["schema"] == 1
    assert [row["name"] for row in raw["layers"]] == weight_bearing(network())


def test_plan_then_apply_is_optimize(folder: Path, capsys: Captured) -> None:
    options = ["--keep-params", "0.5", "--threads", "1"]
    assert run(["plan", "model.onnx", "-o", "plan.json", *options]) == 0
    made = Plan.read(folder / "plan.json")
    count = sum(not choice.keeps for choice in made.layers)
    assert capsys.readouterr().out == f"{count} of {len(made.layers)} layers to be factorized; written to plan.json\n"
    assert run(["apply", "model.onnx", "plan.json", "-o", "applied.onnx"]) == 0
    assert capsys.readouterr().out == f"{count} layers factorized; written to applied.onnx\n"
    assert optimize(*options) == 0
    assert (folder / "applied.onnx").read_bytes() == (folder / "out.onnx").read_bytes()


def test_a_plan_edited_by_hand_is_obeyed(folder: Path) -> None:
    assert run(["plan", "model.onnx", "-o", "plan.json", "--keep-params", "0.5", "--threads", "1"]) == 0
    raw = json.loads((folder / "plan.json").read_text())
    for choice in raw["layers"]:
        choice.update(method="svd", rank=[3]) if choice["key"] == "body/2" else choice.update(method="keep", rank=[])
    (folder / "plan.json").write_text(json.dumps(raw))
    assert run(["apply", "model.onnx", "plan.json", "-o", "out.onnx"]) == 0
    names = [node.name for node in onnx.load(folder / "out.onnx").graph.node]
    assert "body/2/svd_0" in names
    assert "body/1" in names


def test_a_recipe_gives_what_the_command_line_leaves_out(folder: Path, capsys: Captured) -> None:
    (folder / "recipe.toml").write_text(
        'keep-params = 0.9\nthreads = 1\nallocator = "energy"\npasses = ["svd"]\nkeep = ["body/1"]\n'
    )
    assert (
        run(["optimize", "model.onnx", "-o", "out.onnx", "--recipe", "recipe.toml", "--keep-params", "0.6", "--json"])
        == 0
    )
    raw = parsed(capsys)
    assert raw["goal"]["value"] == 0.6
    assert raw["target"]["threads"] == 1
    assert {row["method"] for row in raw["layers"]} == {"keep", "svd"}
    assert {row["name"]: row["reason"] for row in raw["layers"]}["body/1"] == "pinned by --keep body/1"


def test_a_goal_out_of_reach_exits_with_3_and_the_best_found(folder: Path, capsys: Captured) -> None:
    assert optimize("--keep-params", "0.01") == 3
    error = capsys.readouterr().err
    assert error.startswith("error: got ")
    assert error.rstrip().endswith("expected keep-params 0.01; the best found is in out.onnx")
    onnx.checker.check_model(str(folder / "out.onnx"), full_check=True)
    assert (folder / "out.onnx").stat().st_size < (folder / "model.onnx").stat().st_size
    assert run(["plan", "model.onnx", "-o", "plan.json", "--keep-params", "0.01", "--threads", "1"]) == 3
    assert "the best plan found is in plan.json" in capsys.readouterr().err
    assert Plan.read(folder / "plan.json").layers


def test_fail_if_unchanged(folder: Path, capsys: Captured) -> None:
    assert optimize("--latency-ms", "10000") == 0
    assert optimize("--latency-ms", "10000", "--fail-if-unchanged") == 3
    assert capsys.readouterr().err == (
        "error: got no layer rewritten; expected at least one with --fail-if-unchanged; see the reasons per layer\n"
    )


def test_validate(folder: Path, capsys: Captured) -> None:
    assert optimize("--keep-params", "0.6") == 0
    images = np.random.default_rng(0).standard_normal((4, 3, 16, 16)).astype(np.float32)
    np.savez("data.npz", image=images)
    capsys.readouterr()
    assert run(["validate", "model.onnx", "out.onnx", "--data", "data.npz", "--json"]) == 0
    raw = parsed(capsys)
    squares = np.zeros(2)
    for image in images:  # one by one, as the target has batches of one
        a, b = (run_model(onnx.load(name), {"image": image[None]}) for name in ("model.onnx", "out.onnx"))
        squares += [sum(np.sum((p - q) ** 2) for p, q in zip(a, b, strict=True)), sum(np.sum(p**2) for p in a)]
    assert raw["samples"] == 4
    assert raw["relative_error"] == pytest.approx(float(np.sqrt(squares[0] / squares[1])), rel=1e-3)
    assert run(["validate", "model.onnx", "out.onnx"]) == 0
    assert "logits" in capsys.readouterr().out
    assert run(["validate", "model.onnx", "out.onnx", "--max-error", "1e-9"]) == 4
    assert "expected at most 1e-09" in capsys.readouterr().err
    assert run(["validate", "model.onnx", "model.onnx", "--max-error", "1e-9"]) == 0


def test_profile(folder: Path, capsys: Captured) -> None:
    save(perceptron(), folder, "other.onnx")
    assert run(["profile", "other.onnx", "other.onnx", "--threads", "1", "--seconds", "0.2", "--json"]) == 0
    raw = parsed(capsys)
    assert len(raw["models"]) == 2
    assert run(["profile", "other.onnx", "--threads", "1", "--seconds", "0.2"]) == 0
    assert "other.onnx" in capsys.readouterr().out


def test_inspect(folder: Path, capsys: Captured) -> None:
    assert run(["inspect", "model.onnx", "--threads", "1", "--json"]) == 0
    assert sorted(row["name"] for row in parsed(capsys)) == sorted(weight_bearing(network()))
    assert run(["inspect", "model.onnx", "--threads", "1", "--only", "body/*"]) == 0
    text = capsys.readouterr().out
    assert "stays: not named by --only body/*" in text


def test_passes_lists_graph_passes_and_decompositions(folder: Path, capsys: Captured) -> None:
    assert run(["passes", "--json"]) == 0
    names = {entry["name"] for entry in parsed(capsys)}
    assert {"svd", "tucker2", "spatial_svd", "fold_batch_norm"} <= names
    assert run(["passes"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in names)


def test_doctor(folder: Path, capsys: Captured) -> None:
    assert run(["doctor", "--json"]) == 0
    assert parsed(capsys)
    assert run(["doctor"]) == 0
    assert "onnxruntime" in capsys.readouterr().out


def test_bisect_is_printed(folder: Path, capsys: Captured) -> None:
    assert optimize("--keep-params", "0.3", "--bisect") == 0
    assert "bisect: " in capsys.readouterr().out


def test_several_shapes_and_patterns(folder: Path, capsys: Captured) -> None:
    shapes = ["--shape", "image=1x3x16x16*3", "--shape", "image=2x3x16x16"]
    assert optimize("--keep-macs", "0.7", *shapes, "--only", "body/*", "--only", "head", "--json") == 0
    raw = parsed(capsys)
    assert [entry["weight"] for entry in raw["target"]["shapes"]] == [0.75, 0.25]
    reasons = {row["name"]: row["reason"] for row in raw["layers"]}
    assert reasons["stem"] == "not named by --only body/* head"


def test_labels_are_scored(folder: Path, capsys: Captured) -> None:
    images = np.random.default_rng(0).standard_normal((6, 3, 16, 16)).astype(np.float32)
    np.savez("eval.npz", image=images, label=run_model(network(), {"image": images})[0].argmax(axis=1))
    assert optimize("--keep-macs", "0.7", "--eval", "eval.npz", "--metric", "top1") == 0
    assert "top1 (6 samples)" in capsys.readouterr().out


def test_samples_from_anywhere(folder: Path, capsys: Captured) -> None:
    """The same samples as a file, a folder and a function make the same plan, but for what they are called."""
    save(network(32), folder)
    images = np.random.default_rng(0).standard_normal((6, 3, 16, 16)).astype(np.float32)
    np.savez("data.npz", image=images)
    Path("samples").mkdir()
    for i, image in enumerate(images):
        np.save(f"samples/{i}.npy", image)
    Path("feeding_of_mine.py").write_text(
        "import numpy as np\n"
        "def feeds():\n"
        "    yield from ({'image': image[None]} for image in np.load('data.npz')['image'])\n"
    )
    plans: list[Plan] = []
    for source in ("data.npz", "samples", "feeding_of_mine:feeds"):
        options = ["--calibration", source, "--keep-params", "0.5", "--threads", "1"]
        assert run(["plan", "model.onnx", "-o", "plan.json", *options]) == 0
        plans.append(Plan.read(folder / "plan.json"))
        assert run(["apply", "model.onnx", "plan.json", "-o", "out.onnx", "--calibration", source]) == 0
    assert plans[0].data_sha256 == plans[2].data_sha256 != plans[1].data_sha256
    assert (
        run(["apply", "model.onnx", "plan.json", "-o", "out.onnx", "--calibration", "data.npz", "--samples", "5"]) == 2
    )
    assert "for a plan made with data" in capsys.readouterr().err


def test_the_options_reach_the_settings(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Settings] = []

    def stop(*arguments: object, **_: object) -> None:
        asked.extend(argument for argument in arguments if isinstance(argument, Settings))
        raise InputError("enough", "no more", "stop")

    monkeypatch.setattr("onnx_lowrank.pipeline.optimize", stop)
    monkeypatch.setattr("onnx_lowrank.pipeline.plan", stop)
    data = [
        "--calibration",
        "photos",
        "--preprocess",
        "crop=8",
        "--samples",
        "64",
        "--no-refit",
        "--error-metric",
        "kl",
    ]
    goal = ["--max-error", "0.01", "--eval", "mine:labelled", "--metric", "mse"]
    for command in ("optimize", "plan"):
        assert run([command, "model.onnx", "-o", "out.onnx", "--threads", "1", *data, *goal]) == 2
    made = Settings(MaxError(0.01), Target(threads=1), "photos", "crop=8", 64, False, "mine:labelled", "mse", "kl")
    assert asked == [made, made]


def test_a_recipe_may_turn_the_refit_off(folder: Path) -> None:
    Path("recipe.toml").write_text("refit = false\n")
    assert given({"no_refit": False}, Path("recipe.toml")).refit is False
    assert given({"no_refit": True}, None).refit is False
    assert given({"no_refit": False}, None).refit is None


def test_validate_in_another_metric(folder: Path, capsys: Captured) -> None:
    assert optimize("--keep-params", "0.6") == 0
    options = ["--max-error", "1e-9", "--error-metric", "kl"]
    assert run(["validate", "model.onnx", "out.onnx", *options]) == 4
    captured = capsys.readouterr()
    assert captured.err.startswith("error: got kl error ")
    assert "kl error " in captured.out


@pytest.mark.parametrize("place", ["before", "behind"])
def test_verbose_logs_on_standard_error(folder: Path, capsys: Captured, place: str) -> None:
    words = ["optimize", "model.onnx", "-o", "out.onnx", "--threads", "1", "--max-error", "0.05", "--json", "-v"]
    save(shared(), folder)
    assert run(words if place == "behind" else words[-1:] + words[:-1]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["goal"]["kind"] == "max-error"
    assert "predicted loss" in captured.err


@pytest.mark.parametrize("arguments", [["--help"], ["optimize", "--help"]])
def test_help(arguments: list[str], folder: Path, capsys: Captured) -> None:
    assert run(arguments) == 0
    text = capsys.readouterr().out
    assert "Usage" in text
    if "optimize" in arguments:
        flat = " ".join(text.replace("│", " ").split())
        assert "No fit to the original's outputs; weights are still approximated on the samples." in flat
        assert "Seed of drawn inputs, random searches and intervals; samples are always divided alike." in flat
        assert all(option in text for option in ("--max-drop", "--preprocess", "--no-refit", "--error-metric"))
        assert all(option in text for option in ("--speedup", "--keep-macs", "--recipe", "--plan-out", "--bisect"))


def test_main_exits_with_the_code(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setattr(sys, "argv", ["onnx-lowrank", "apply", "model.onnx", "missing.json", "-o", "out.onnx"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: got missing.json (")


def test_progress_is_shown_on_a_terminal_only() -> None:
    for terminal in (True, False):
        text = io.StringIO()
        phases = phases_on(Console(file=text, force_terminal=terminal, width=80))
        with phases.phase("decompose") as advance:
            advance(3, 7)
        with phases.phase("decompose") as advance:
            advance(7, 7)
        assert list(phases.seconds) == ["decompose"]
        assert ("decompose" in text.getvalue()) == terminal


@pytest.mark.slow
def test_the_demo_runs_offline(folder: Path, capsys: Captured) -> None:
    code = run(["demo", "--speedup", "1.01", "-o", "demo.onnx", "--json"])
    raw = parsed(capsys)
    assert code == (0 if raw["goal"]["reached"] else 3)
    assert raw["accuracy"]["samples"] == 2000
    assert raw["accuracy"]["before"] > 0.9
    assert raw["accuracy"]["after"] > 0.85
    onnx.checker.check_model(str(folder / "demo.onnx"), full_check=True)
