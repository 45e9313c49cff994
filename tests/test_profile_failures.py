"""A model that fails under some conditions costs its rows under these, and the reason is told; the rest is kept."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import model, value
from onnx import helper
from rich.console import Console
from test_child import SEGFAULT, provider

from onnx_lowrank.cli import run
from onnx_lowrank.errors import InputError
from onnx_lowrank.latency.child import Child
from onnx_lowrank.profile import Profile, Sweep, profile, render
from onnx_lowrank.target import InputShapes, Target

ONE = Target(threads=1, levels=("all",))
NOT_COMPARED = "fits_two.onnx, which it is compared with, failed"


def saved(folder: Path, name: str, rows: int) -> Path:
    """x + w with `rows` rows in w: runs on 1 and on `rows` rows of x, on any number where `rows` is 1."""
    node = helper.make_node("Add", ["x", "w"], ["y"])
    weights = {"w": np.ones((rows, 4), np.float32)}
    onnx.save(model([node], [value("x", ["n", 4])], [value("y", ["m", 4])], weights), folder / name)
    return folder / name


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return {name: saved(tmp_path, f"{name}.onnx", rows) for name, rows in (("any", 1), ("fits_two", 2), ("also", 1))}


def kept(result: Profile) -> list[tuple[str, int]]:
    return [(Path(row.path).stem, row.batch) for row in result.models]


def lost(result: Profile) -> list[tuple[str, int]]:
    return [(Path(failure.path).stem, failure.batch) for failure in result.failures]


def test_the_others_of_a_combination_are_raced(files: dict[str, Path]) -> None:
    result = profile(list(files.values()), ONE, budget_s=0.1, sweep=Sweep(batches=(3, 1)))
    assert kept(result) == [("any", 3), ("also", 3), ("any", 1), ("fits_two", 1), ("also", 1)]
    assert [(entry.before, entry.after) for entry in result.comparisons] == [(0, 1), (2, 3), (2, 4)]
    (failure,) = result.failures
    assert (failure.path, failure.batch, failure.shapes) == (str(files["fits_two"]), 3, {"x": (3, 4)})
    assert failure.reason.startswith(f"got inputs that {files['fits_two']} cannot run on (")
    console = Console(width=160)
    with console.capture() as captured:
        render(result, console)
    said = f"fits_two.onnx was not timed (threads 1, batch 3, inputs x=3x4, level all): {failure.reason}"
    assert captured.get().splitlines()[-1] == said


def test_nothing_is_compared_with_a_first_file_that_failed(files: dict[str, Path]) -> None:
    result = profile([files["fits_two"], files["any"]], ONE, budget_s=0.1, sweep=Sweep(batches=(1, 3)))
    assert kept(result) == [("fits_two", 1), ("any", 1)]
    assert lost(result) == [("fits_two", 3), ("any", 3)]
    assert [failure.reason.startswith("got inputs") for failure in result.failures] == [True, False]
    assert result.failures[1].reason == NOT_COMPARED


def test_a_set_of_shapes_that_fails_leaves_the_other_ones(files: dict[str, Path]) -> None:
    target = Target(threads=1, shapes=(InputShapes({"x": (3, 4)}), InputShapes({"x": (2, 4)})))
    result = profile([files["any"], files["fits_two"]], target, budget_s=0.1)
    assert kept(result) == [("any", 3), ("any", 2), ("fits_two", 2)]
    assert [row.race for row in result.models] == [0, 1, 1]
    assert lost(result) == [("fits_two", 3)]


def test_what_the_measuring_process_dies_of_costs_its_rows(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = Child(provider(tmp_path, SEGFAULT, culprit=2))
    monkeypatch.setattr("onnx_lowrank.latency.race.shared", lambda: child)
    result = profile(list(files.values()), ONE, budget_s=0.1, sweep=Sweep(batches=(1, 2)))
    child.close()
    assert kept(result) == [("any", 1), ("also", 1), ("any", 2), ("also", 2)]
    assert lost(result) == [("fits_two", 1), ("fits_two", 2)]
    assert {failure.reason for failure in result.failures} == {
        "got models whose measuring process died (signal 11); expected a provider that runs them; "
        "try another one, or other options"
    }


def test_a_file_that_takes_none_of_the_inputs_is_refused_at_once(files: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=r"^got inputs that .*fits_two\.onnx cannot run on "):
        profile(list(files.values()), ONE, sweep=Sweep(batches=(3, 5)))


def test_the_file_is_written_and_the_exit_code_is_that_of_what_there_is(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--threads", "1", "--levels", "all", "--seconds", "0.1", "-o", "found.json"]
    assert run(["profile", "any.onnx", "fits_two.onnx", "--batch", "1,3", *options]) == 0
    said = "fits_two.onnx was not timed (threads 1, batch 3, inputs x=3x4, level all): got inputs"
    assert said in capsys.readouterr().out
    raw = json.loads((tmp_path / "found.json").read_text())
    assert [(entry["path"], entry["batch"], entry["levels"]) for entry in raw["failures"]] == [
        ("fits_two.onnx", 3, ["all"])
    ]
    files["any"].unlink()
    assert run(["profile", "fits_two.onnx", "--shape", "x=3x4", *options]) == 2
    assert capsys.readouterr().err.startswith(f"error: got inputs that {files['fits_two']} cannot run on (")
