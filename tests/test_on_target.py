"""measure.py opens sessions as the package does, says what is wrong in a sentence, and survives what kills it."""

from __future__ import annotations

import argparse
import ast
import json
import signal
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builders import model, value
from onnx import helper
from roads import network, save

from onnx_lowrank.cli import run
from onnx_lowrank.latency.circumstances import lowered_by
from onnx_lowrank.latency.on_target_journal import DiedError, Journal
from onnx_lowrank.latency.on_target_sessions import (
    RefusedError,
    RequestError,
    Target,
    check_known,
    check_left,
    check_telling,
)
from onnx_lowrank.latency.table_file import read
from onnx_lowrank.latency_request import REQUESTABLE, SCRIPT, script
from onnx_lowrank.placement import shape_computations
from onnx_lowrank.target import PROVIDERS
from onnx_lowrank.target import Target as Known

pytestmark = pytest.mark.usefixtures("quick")
# A process that dies of what the environment names, as a provider would take it along; no time is spent on timing.
DEADLY = """if True:
    import os, sys
    from onnx_lowrank.latency import on_target, on_target_sessions
    from onnx_lowrank.latency.circumstances import lowered_by
    bind, what, how = on_target_sessions.Target.bind_chain, sys.argv.pop(), sys.argv.pop()

    def bind_chain(self, model, level, shapes=()):
        if what and what.encode() in model:
            os._exit(139) if how == "dies" else os.kill(os.getpid(), int(how))
        return bind(self, model, level, shapes)

    on_target_sessions.Target.bind_chain = bind_chain
    on_target.MADE_BY = lowered_by()
    sys.exit(on_target.main())
"""


@pytest.fixture(scope="module")
def request_file(tmp_path_factory: pytest.TempPathFactory, quick: None) -> Path:
    """A request, with its script beside it."""
    folder = tmp_path_factory.mktemp("request")
    path = save(network(), folder)
    assert run(["latency", "request", str(path), "-o", str(folder / "request.zip"), "--threads", "1"]) == 0
    with zipfile.ZipFile(folder / "request.zip") as request:
        request.extract(SCRIPT, folder)
    return folder / "request.zip"


def manifest(path: Path) -> Any:
    with zipfile.ZipFile(path) as request:
        return json.loads(request.read("manifest.json"))


def measured(request_file: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(request_file.with_name(SCRIPT)), "-o", str(folder / "table.json"), *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=600)


def opened(provider: str = "cuda", options: dict[str, str] | None = None) -> Target:
    raw = {
        "provider": provider,
        "options": options or {},
        "threads": 1,
        "config": {},
        "provider_name": PROVIDERS[provider],
    }
    asked = argparse.Namespace(provider_option=[], threads=None, allow_fallback=True)
    return Target(asked, {**raw, "threads": 1, "config": {}})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--provider-option", "x"], "got --provider-option x; expected name=value; write it like that"),
        (["--threads", "-1"], "got --threads -1; expected 0 (all cores) or more; give another number"),
        (
            ["--provider-option", "arena=1"],
            "got unknown option arena of provider cpu; expected none: it has no options; correct it",
        ),
    ],
)
def test_what_cannot_be_measured_is_a_sentence(
    request_file: Path, tmp_path: Path, options: list[str], said: str
) -> None:
    done = measured(request_file, tmp_path, *options)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, f"error: {said}")
    assert list(tmp_path.iterdir()) == []


def test_a_request_that_is_none_is_a_sentence(request_file: Path, tmp_path: Path) -> None:
    (tmp_path / "r.zip").write_text("no zip")
    done = measured(request_file, tmp_path, "--request", "r.zip")
    assert done.stderr == (
        f"error: got r.zip for {tmp_path / 'table.json'} (BadZipFile: File is not a zip file); expected a file of "
        "`onnx-lowrank latency request`, and room for its table; check both paths\n"
    )


def test_a_script_of_another_version_measures_nothing(request_file: Path, tmp_path: Path) -> None:
    other = tmp_path / SCRIPT
    own = lowered_by()
    other.write_text(request_file.with_name(SCRIPT).read_text().replace(own, "0.0.1"))
    done = measured(other, tmp_path, "--request", str(request_file))
    said = f"got {request_file} of onnx-lowrank {own}; expected one of 0.0.1, as this script is"
    assert (done.returncode, done.stderr) == (2, f"error: {said}; unpack measure.py of that request\n")


def test_a_request_is_for_one_provider(request_file: Path, tmp_path: Path) -> None:
    """Chains of others are lowered, probed and timed otherwise."""
    assert (manifest(request_file)["provider"], manifest(request_file)["provider_name"]) == ("cpu", PROVIDERS["cpu"])
    assert (
        b"unrecognized arguments: --provider cuda"
        in measured(request_file, tmp_path, "--provider", "cuda").stderr.encode()
    )
    path = save(network(), tmp_path)
    assert run(["latency", "request", str(path), "-o", str(tmp_path / "gpu.zip"), "--provider", "cuda"]) == 0
    told = {
        name: {w for group in manifest(file)["layers"] for w in [group["what"]] if "before Conv" in w}
        for name, file in (("cpu", request_file), ("cuda", tmp_path / "gpu.zip"))
    }
    assert told["cpu"]
    assert not told["cuda"]


def test_computations_of_shapes_are_listed_as_the_package_judges_them(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"], name="shape"),
        helper.make_node("Gather", ["s", "zero"], ["n"], name="gather", axis=0),
        helper.make_node("Concat", ["n", "rest"], ["to"], name="concat", axis=0),
        helper.make_node("Reshape", ["x", "to"], ["flat"], name="reshape"),
        helper.make_node("MatMul", ["flat", "w"], ["y"], name="product"),
    ]
    constants = {"zero": np.array([0]), "rest": np.array([-1]), "w": np.ones((16, 64), np.float32)}
    path = tmp_path / "m.onnx"
    onnx.save(model(nodes, [value("x", ["n", 4, 4])], [value("y", ["n", 64])], constants), path)
    assert run(["latency", "request", str(path), "-o", str(tmp_path / "r.zip")]) == 0
    first = manifest(tmp_path / "r.zip")["models"][0]
    assert {tuple(label) for label in first["shapes"]} == shape_computations(onnx.load(path))
    left = [("Gather", "gather"), ("Concat", "concat")]
    check_left(left, {(op, name) for op, name in first["shapes"]}, "cuda")
    with pytest.raises(RefusedError) as caught:
        check_left([*left, ("Reshape", "reshape")], {(op, name) for op, name in first["shapes"]}, "cuda")
    assert str(caught.value) == (
        "1 nodes that cuda leaves to another provider (Reshape reshape); --allow-fallback lets it"
    )


def test_what_nobody_can_check_is_refused() -> None:
    check_telling("cuda", tells=True)
    with pytest.raises(RequestError, match=r"which does not say which nodes cuda takes; expected onnxruntime 1\.24 or"):
        check_telling("cuda", tells=False)
    check_known("cuda", {"device_id": "1"}, ["device_id", "use_tf32"])
    with pytest.raises(RequestError, match=r"^got unknown option device of provider cuda; expected device_id; correct"):
        check_known("cuda", {"device": "1"}, ["device_id"])


@pytest.mark.parametrize("provider", REQUESTABLE)
@pytest.mark.parametrize("options", [{}, {"device_id": "1"}, {"enable_cuda_graph": "1"}, {"enable_cuda_graph": "0"}])
def test_memory_and_graphs_are_those_of_the_package(provider: str, options: dict[str, str]) -> None:
    there, here = opened(provider, options), Known(provider, 1, provider_options=options)
    assert (there.device, there.captures_graph) == (here.device, here.captures_graph)


def attempt(request_file: Path, folder: Path, what: str = "", how: str = "dies") -> int:
    command = [sys.executable, "-c", DEADLY, "--request", str(request_file), "-o", str(folder / "table.json")]
    return subprocess.run([*command, how, what], capture_output=True, check=False, timeout=600).returncode


def victims(request_file: Path, folder: Path, count: int) -> tuple[Path, list[str]]:
    """The request with its last chains for any channel block marked, and their keys."""
    marked, layers = folder / "marked.zip", manifest(request_file)["layers"]
    chosen = [chain for group in layers for chain in group["chains"] if len(chain["blocks"]) == 4][-count:]
    assert len(chosen) == count
    with zipfile.ZipFile(request_file) as source, zipfile.ZipFile(marked, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name in {chain["file"] for chain in chosen}:
                proto = onnx.load_from_string(data)
                proto.doc_string = f"deadly {[chain['file'] for chain in chosen].index(name)}"
                data = proto.SerializeToString()
            target.writestr(name, data)
    return marked, [chain["key"] for chain in chosen]


def test_chains_that_the_process_dies_of_are_left_out_and_what_was_measured_stays(
    request_file: Path, tmp_path: Path
) -> None:
    request, keys = victims(request_file, tmp_path, 2)
    journal = tmp_path / "table.json.unfinished"
    assert attempt(request, tmp_path, "deadly 0") == 139
    first = {record.key: record for section in read(tmp_path / "table.json") for record in section.records}
    assert first
    assert attempt(request, tmp_path, "deadly") == 139, "the next one"
    assert journal.exists()
    assert attempt(request, tmp_path, "deadly") == 0
    assert not journal.exists()
    sections = read(tmp_path / "table.json")
    records = {record.key: record for section in sections for record in section.records}
    assert [(records[key].ms, records[key].reason) for key in keys] == [(None, "the process died of it")] * 2
    assert sum(section.dropped for section in sections) == 2
    assert all(records[key] == record for key, record in first.items()), "timed once"
    assert len(records) > len(first) + len(keys)


def test_whoever_ends_it_in_order_blames_no_chain(request_file: Path, tmp_path: Path) -> None:
    request, keys = victims(request_file, tmp_path, 1)
    assert attempt(request, tmp_path, "deadly", str(int(signal.SIGTERM))) == 143
    journal = tmp_path / "table.json.unfinished"
    assert json.loads(journal.read_text())["opening"] is None
    assert attempt(request, tmp_path) == 0
    records = {record.key: record for section in read(tmp_path / "table.json") for record in section.records}
    assert records[keys[0]].ms is not None


def test_another_measurement_starts_anew(tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    out.write_text(json.dumps({"tables": ["of before"]}))
    journal = Journal(out, "one")
    assert journal.tables == [], "whatever is in the table is of an earlier measurement"
    journal.started()
    with pytest.raises(KeyboardInterrupt), journal.opening("interrupted"):
        raise KeyboardInterrupt
    left = journal.opening("deadly")
    left.__enter__()  # and never out of it
    again = Journal(out, "one")
    assert again.tables == ["of before"]
    with pytest.raises(DiedError, match=r"^the process died of it$"), again.opening("deadly"):
        pass
    with again.opening("interrupted"):
        pass
    other = Journal(out, "other")
    assert other.tables == []
    with other.opening("deadly"):
        pass
    other.finish()
    assert not other.path.exists()


def test_the_parts_of_the_script_do_not_hide_each_other() -> None:
    bound: Counter[str] = Counter()
    for node in ast.parse(script()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound[node.name] += 1
        elif isinstance(node, ast.Assign):
            bound.update(name.id for name in node.targets if isinstance(name, ast.Name))
    assert [name for name, times in bound.items() if times > 1] == []
