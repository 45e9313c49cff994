"""Latency tables as files: what is exported comes back, what is not of here is not used here, plans by a file."""

from __future__ import annotations

import ast
import json
import math
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from roads import network, save

from onnx_lowrank.cli import run
from onnx_lowrank.latency.circumstances import Circumstances
from onnx_lowrank.latency.table import CACHE_VARIABLE, LatencyTable
from onnx_lowrank.latency.table_file import Section, merge, read, sections, to_json
from onnx_lowrank.latency_request import script
from onnx_lowrank.plan import Plan
from onnx_lowrank.target import Target

pytestmark = pytest.mark.usefixtures("quick")
Captured = pytest.CaptureFixture[str]
Measured = Callable[[], Path]
HERE = Circumstances.here(Target(threads=1))
REMEDY = "export it again with `onnx-lowrank latency export`, or run measure.py again"
# A plan by a table alone is the first allocation; which goal does not matter here, as long as chains are chosen.
GOAL = ("--speedup", "1.05")
OTHER_PYTHON = "ONNX_LOWRANK_OTHER_PYTHON"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a model and a latency table of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    save(network(), tmp_path)
    return tmp_path


def plan(out: str, *options: str) -> int:
    code = run(["plan", "model.onnx", "-o", out, *GOAL, *options])
    assert code in {0, 3}
    return code


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory, quick: None) -> Path:
    """A folder with latencies of the model measured once: the cache, and its table exported."""
    folder = tmp_path_factory.mktemp("there")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv(CACHE_VARIABLE, str(folder / "cache"))
        save(network(), folder)
        run(["plan", "model.onnx", "-o", "measured.json", *GOAL, "--threads", "1"])
        assert run(["latency", "export", "-o", "table.json"]) == 0
    return folder


@pytest.fixture
def measured(folder: Path, there: Path, capsys: Captured) -> Measured:
    """Brings these latencies into the working folder's own cache; returns the table."""

    def bring() -> Path:
        shutil.copytree(there / "cache", folder / "cache", dirs_exist_ok=True)
        capsys.readouterr()
        shutil.copy(there / "table.json", folder)
        return folder / "table.json"

    return bring


def edited(path: Path, change: Callable[[Any], None]) -> None:
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def everywhere(name: str, value: object) -> Callable[[Any], None]:
    def change(raw: Any) -> None:
        for section in raw["tables"]:
            section["circumstances"][name] = value

    return change


def test_an_import_is_whole_or_not_at_all(folder: Path, measured: Measured) -> None:
    content = read(measured())

    def broken() -> Iterator[Section]:
        yield from content
        raise InterruptedError

    with LatencyTable(folder / "other.sqlite") as other:
        with pytest.raises(InterruptedError):
            merge(other, broken())
        assert (len(other), other.circumstances()) == (0, [])
        merge(other, content)
        assert to_json(sections(other)) == to_json(content)


def test_what_is_exported_comes_back_and_plans_the_same(folder: Path, measured: Measured, capsys: Captured) -> None:
    table = measured()
    with LatencyTable() as mine, LatencyTable.in_memory() as other:
        merge(other, read(table))
        assert to_json(sections(other)) == table.read_text() == to_json(sections(mine))
    in_place = plan("in_place.json", "--device", "")
    assert plan("from_file.json", "--table", "table.json") == in_place
    assert (folder / "from_file.json").read_bytes() == (folder / "in_place.json").read_bytes()
    made = Plan.read(folder / "from_file.json")
    assert made.planned_for.startswith(f"{HERE.label}, measured there on 20")
    assert any(not choice.keeps for choice in made.layers)
    assert "predicted, not measured" in capsys.readouterr().out
    # On a machine that has nothing but the file, and once more by way of its table.
    os.environ[CACHE_VARIABLE] = str(folder / "elsewhere")  # undone by the fixture's monkeypatch
    assert plan("there.json", "--table", "table.json") == in_place
    assert run(["latency", "import", "table.json"]) == 0
    assert plan("imported.json", "--device", "") == in_place
    assert (folder / "there.json").read_bytes() == (folder / "in_place.json").read_bytes()
    assert (folder / "imported.json").read_bytes() == (folder / "in_place.json").read_bytes()


@pytest.mark.parametrize(("name", "value"), [("device", "a toaster"), ("onnxruntime", "1.0.0"), ("threads", 7)])
def test_latencies_of_another_device_or_version_are_never_used_silently(
    folder: Path, measured: Measured, capsys: Captured, name: str, value: object
) -> None:
    table = measured()
    edited(table, everywhere(name, value))
    capsys.readouterr()
    with LatencyTable.in_memory() as only:
        merge(only, read(table))
        assert all(where != Circumstances.here(where.target(), where.level) or name == "threads"
                   for where in only.circumstances())  # fmt: skip
        assert all(only.record(r.key, HERE.at(level)) is None for s in sections(only) for r in s.records
                   for level in ("all", "extended"))  # fmt: skip
    assert run(["latency", "import", "table.json"]) == 0
    assert str(value) in capsys.readouterr().out
    # Both are in the table now: which is meant has to be said.
    assert run(["plan", "model.onnx", "-o", "p.json", *GOAL, "--device", ""]) == 2
    assert "expected one of them; choose it by --device NAME" in capsys.readouterr().err
    plan("p.json", "--table", "table.json")
    assert str(value) in Plan.read(folder / "p.json").planned_for


def test_chains_of_another_version_are_refused(folder: Path, measured: Measured, capsys: Captured) -> None:
    edited(measured(), everywhere("lowered_by", "0.0.1"))
    capsys.readouterr()
    assert run(["plan", "model.onnx", "-o", "p.json", *GOAL, "--table", "table.json", "--threads", "1"]) == 2
    command = "onnx-lowrank latency request model.onnx -o request.zip --threads 1"
    wanted = f"got table.json with chains of onnx-lowrank 0.0.1; expected those of {HERE.lowered_by}"
    assert capsys.readouterr().err == f"error: {wanted}; measure it there: {command}\n"


def test_what_is_missing_is_named_with_the_command_that_measures_it(
    folder: Path, measured: Measured, capsys: Captured
) -> None:
    table = measured()
    where = f"on {HERE.label}; expected it measured there; measure it there: onnx-lowrank latency request model.onnx"
    told: list[str] = []
    options = ["plan", "model.onnx", "-o", "p.json", *GOAL, "--table", "table.json"]
    capsys.readouterr()
    assert run([*options, "--shape", "image=3x3x16x16"]) == 2
    told.append(capsys.readouterr().err)
    missing = "got table.json without the latency of the model model.onnx on inputs image=3x3x16x16"
    assert told[-1] == f"error: {missing} {where} -o request.zip --shape image=3x3x16x16\n"
    edited(table, lambda raw: raw["tables"][0].update(channel_blocks={}) or None)
    assert run(options) == 2
    told.append(capsys.readouterr().err)
    assert told[-1] == f"error: got table.json without the channel block of conv {where} -o request.zip\n"
    assert run([*options, "--provider", "cuda"]) == 2
    assert "expected --provider cuda; measure it there" in capsys.readouterr().err
    assert not (folder / "p.json").exists()


def test_a_goal_of_size_needs_no_table(folder: Path, measured: Measured, capsys: Captured) -> None:
    measured()
    capsys.readouterr()
    assert run(["plan", "model.onnx", "-o", "p.json", "--keep-macs", "0.5", "--table", "table.json"]) == 2
    said = "got --keep-macs 0.5 for table.json; expected a goal that time decides"
    advice = "no latency decides a goal of size: leave --table, --device and --estimate out"
    assert capsys.readouterr().err == f"error: {said}; {advice}\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "{",
            "got t.json that is not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))",
        ),
        ("[]", "got t.json, which holds no latencies"),
        ('{"schema": 2, "tables": []}', "got schema 2 in t.json; expected schema 1"),
        ('{"schema": 1, "tables": [{}]}', "got t.json with a bad field (KeyError: 'circumstances')"),
    ],
)
def test_damaged_files_are_refused(folder: Path, capsys: Captured, text: str, said: str) -> None:
    (folder / "t.json").write_text(text)
    assert run(["latency", "import", "t.json"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}; expected ") or error == f"error: {said}; {REMEDY}\n"
    assert error.endswith(f"; {REMEDY}\n")


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("ms", -1, "ValueError: ms -1 of"),
        ("ms", "fast", "ValueError: ms 'fast' of"),
        ("kind", "thing", "ValueError: kind 'thing' of"),
        ("samples", 10**30, f"ValueError: samples {10**30} of"),
        ("measured", "yesterday", "ValueError: Invalid isoformat string: 'yesterday'"),
    ],
)
def test_bad_records_are_named(folder: Path, capsys: Captured, field: str, value: object, said: str) -> None:
    record = {
        "key": "k",
        "what": "Conv",
        "ms": 1.0,
        "samples": 7,
        "kind": "chain",
        "reason": "",
        "measured": "2026-11-22",
    }
    section = {"circumstances": HERE.to_dict(), "channel_blocks": {}, "records": [record | {field: value}]}
    (folder / "t.json").write_text(json.dumps({"schema": 1, "tables": [section]}))
    assert run(["latency", "show", "t.json"]) == 2
    assert f"got t.json with a bad field ({said}" in capsys.readouterr().err


@pytest.mark.parametrize("block", [8.0, math.inf, 0, True])
def test_channel_blocks_that_are_none_are_refused(folder: Path, capsys: Captured, block: float) -> None:
    section = {"circumstances": HERE.to_dict(), "channel_blocks": {"conv": block}, "records": []}
    (folder / "t.json").write_text(json.dumps({"schema": 1, "tables": [section]}))
    assert run(["latency", "import", "t.json"]) == 2
    assert f"got t.json with a bad field (ValueError: channel block {block!r} of conv)" in capsys.readouterr().err


def test_a_provider_the_script_cannot_time_is_refused(folder: Path, capsys: Captured) -> None:
    assert run(["latency", "request", "model.onnx", "-o", "r.zip", "--provider", "openvino"]) == 2
    advice = "run `onnx-lowrank optimize` on the device itself"
    said = f"error: got --provider openvino; expected one of cpu, cuda, which the script can time; {advice}\n"
    assert capsys.readouterr().err == said


def test_show_groups_by_circumstances(folder: Path, measured: Measured, capsys: Captured) -> None:
    assert run(["latency", "show"]) == 0
    assert capsys.readouterr().out == "nothing was measured yet\n"
    assert run(["latency", "export", "-o", "t.json"]) == 2
    measured()
    capsys.readouterr()
    assert run(["latency", "show", "--json"]) == 0
    mine = capsys.readouterr().out
    raw = json.loads(mine)
    assert sum(entry["models"] for entry in raw) >= 1  # nothing to normalize: both models may be one
    assert all(entry["circumstances"]["device"] == HERE.device for entry in raw)
    assert run(["latency", "show", "table.json", "--json"]) == 0
    assert capsys.readouterr().out == mine
    assert run(["latency", "show"]) == 0
    assert capsys.readouterr().out.startswith(HERE.device)


def measure(python: str, folder: Path) -> None:
    """Run the request's script as on a machine without this package: isolated, in a folder of its own."""
    room = folder / "device"
    room.mkdir()
    (folder / "request.zip").replace(room / "request.zip")
    with zipfile.ZipFile(room / "request.zip") as request:
        request.extract("measure.py", room)
    stub = (
        "import runpy, sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in {'onnx', 'onnx_lowrank', 'scipy'}: raise AssertionError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        f"sys.argv = ['measure.py', '-o', {str(folder / 'table.json')!r}]\n"
        f"runpy.run_path({str(room / 'measure.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run([python, "-I", "-c", stub], capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1].startswith("written to ")


def spoil_a_chain(folder: Path) -> str:
    """Damage one micro-model in the request; its key."""
    old, new = folder / "request.zip", folder / "spoilt.zip"
    with zipfile.ZipFile(old) as source, zipfile.ZipFile(new, "w", zipfile.ZIP_DEFLATED) as target:
        manifest = json.loads(source.read("manifest.json"))
        victim = next(c for group in manifest["layers"] for c in group["chains"] if len(c["blocks"]) == 4)
        for name in source.namelist():
            target.writestr(name, b"no model" if name == victim["file"] else source.read(name))
    new.replace(old)
    return str(victim["key"])


def test_a_request_answered_plans_without_timing_anything(folder: Path, capsys: Captured) -> None:
    assert run(["latency", "request", "model.onnx", "-o", "request.zip", "--threads", "1"]) == 0
    assert (folder / "request.zip").stat().st_size < 1_000_000
    spoilt = spoil_a_chain(folder)
    measure(sys.executable, folder)
    records = {r.key: r for s in read(folder / "table.json") for r in s.records}
    assert records[spoilt].ms is None
    assert "protobuf parsing failed" in records[spoilt].reason
    (section,) = [s for s in read(folder / "table.json") if s.chains]
    assert section.where == HERE.at(section.where.level)
    assert section.dropped == 1
    os.environ[CACHE_VARIABLE] = str(folder / "empty")
    plan("plan.json", "--table", "table.json")
    assert "1 chains are left out" in capsys.readouterr().err
    with LatencyTable() as untouched:
        assert len(untouched) == 0
    assert run(["apply", "model.onnx", "plan.json", "-o", "out.onnx"]) == 0
    onnx.checker.check_model(str(folder / "out.onnx"), full_check=True)


def test_prices_there_are_those_of_here(folder: Path) -> None:
    """The script times what the package times: the same keys, and latencies alike as far as a busy machine allows."""
    assert run(["latency", "request", "model.onnx", "-o", "request.zip", "--threads", "1"]) == 0
    measure(sys.executable, folder)
    there = {r.key: r.ms for s in read(folder / "table.json") for r in s.records if s.where.level == "all"}
    run(["plan", "model.onnx", "-o", "p.json", *GOAL, "--threads", "1"])
    with LatencyTable() as table:
        here = {r.key: r.ms for r in table.records(HERE)}
    both = [key for key in here if there.get(key) and here[key]]
    assert len(both) >= 2
    assert all(0.01 < np.float64(here[key] or 0) / np.float64(there[key] or 1) < 100 for key in both)


def test_the_script_is_python_3_9() -> None:
    tree = ast.parse(script(), feature_version=(3, 9))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    foreign = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert foreign == {"numpy", "onnxruntime"}


@pytest.mark.slow
def test_round_trip_with_another_onnxruntime(folder: Path) -> None:
    python = os.environ.get(OTHER_PYTHON)
    if python is None:
        pytest.skip(f"{OTHER_PYTHON} names no python with another onnxruntime")
    assert run(["latency", "request", "model.onnx", "-o", "request.zip", "--threads", "1"]) == 0
    measure(python, folder)
    plan("plan.json", "--table", "table.json")
    version = subprocess.run(
        [python, "-c", "import onnxruntime; print(onnxruntime.__version__)"], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert version != HERE.onnxruntime
    assert f"onnxruntime {version}" in Plan.read(folder / "plan.json").planned_for
