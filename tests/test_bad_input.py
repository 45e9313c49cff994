"""Bad input: one line that says got, expected and do; the right exit code; nothing written; the input untouched."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
from bad_inputs import MODEL, SETUPS, Case, cases, good_model
from builders import model, product_model, value
from onnx import helper

from onnx_lowrank.cli import run
from onnx_lowrank.latency.table import CACHE_VARIABLE
from onnx_lowrank.providers import provider_reason

pytestmark = pytest.mark.usefixtures("quick")
CASES = {case.name: case for case in cases()}
COMMAND = (sys.executable, "-c", "from onnx_lowrank.cli import main; main()")
OPTIMIZE = ("optimize", "model.onnx", "-o", "out.onnx", "--threads", "1", "--keep-macs", "0.5")
NOBODY = 65534


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a good model in it."""
    monkeypatch.chdir(tmp_path)
    onnx.save(good_model(), MODEL)
    return tmp_path


@pytest.fixture
def unprivileged(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """As `folder`, for a user whom permissions bind: root reads and writes everything."""
    with tempfile.TemporaryDirectory() as name:
        monkeypatch.chdir(name)
        onnx.save(good_model(), MODEL)
        root = os.geteuid() == 0
        if root:
            for path in (name, MODEL):
                os.chown(path, NOBODY, NOBODY)
            os.seteuid(NOBODY)
        yield Path(name)
        if root:
            os.seteuid(0)
        Path(name).chmod(0o700)


def contents(folder: Path) -> dict[str, bytes | None]:
    """Path -> bytes of every file, None for folders."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def test_every_setup_belongs_to_a_case() -> None:
    assert SETUPS.keys() <= CASES.keys()
    assert len(CASES) >= 100


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_refused(case: Case, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    case.prepare()
    before = contents(folder)
    code = run(shlex.split(case.run))
    said, complaint = capfd.readouterr()
    assert re.fullmatch(case.pattern, complaint), complaint
    assert (code, said) == (case.code, "")
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["truncated", "unknown command"])
def test_refused_by_the_real_process(name: str, folder: Path) -> None:
    case = CASES[name]
    case.prepare()
    before = contents(folder)
    done = subprocess.run([*COMMAND, *shlex.split(case.run)], capture_output=True, text=True, check=False)
    assert re.fullmatch(case.pattern, done.stderr), done.stderr
    assert (done.returncode, done.stdout) == (case.code, "")
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["missing", "NaN weight", "custom operator", "NaN samples"])
def test_an_older_result_stays(name: str, folder: Path) -> None:
    CASES[name].prepare()
    Path("out.onnx").write_bytes(b"yesterday's")
    assert run(shlex.split(CASES[name].run)) == 2
    assert Path("out.onnx").read_bytes() == b"yesterday's"


def test_messages_stay_on_one_line(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name = "a long name/" * 30 + "with\na line break [bold] and markup.onnx"
    assert run(["optimize", name, "-o", "out.onnx"]) == 2
    right = f"got {name}, which does not exist; expected an ONNX file; check the path".replace("\n", " ")
    assert capfd.readouterr().err == f"error: {right}\n"


def test_nothing_to_rewrite_is_no_error(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    x, y = value("x", [2, 12]), value("y", [2, 12])
    onnx.save(model([helper.make_node("Relu", ["x"], ["y"])], [x], [y]), MODEL)
    command = ["optimize", "model.onnx", "-o", "out.onnx", "--threads", "1"]
    assert run(command) == 0
    assert capfd.readouterr().err == ""
    assert run([*command, "--fail-if-unchanged"]) == 3
    right = "got no layer rewritten; expected at least one with --fail-if-unchanged; see the reasons per layer"
    assert capfd.readouterr().err == f"error: {right}\n"
    onnx.checker.check_model("out.onnx")


def test_provider_that_does_not_load(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if provider_reason("cuda") is None:
        pytest.skip("CUDA loads here")
    before = contents(folder)
    assert run([*OPTIMIZE, "--provider", "cuda"]) == 2
    said, complaint = capfd.readouterr()
    assert re.fullmatch(
        r"error: got provider cuda that does not load here \(.+\); expected a working CUDAExecutionProvider; "
        r"install what it needs \(onnx-lowrank doctor says more\), or choose another provider\n",
        complaint,
    ), complaint
    assert (said, contents(folder)) == ("", before)


def test_unreadable_model(unprivileged: Path, capfd: pytest.CaptureFixture[str]) -> None:
    MODEL.chmod(0)
    assert run([*OPTIMIZE]) == 2
    right = "got model.onnx, which cannot be read (Permission denied); expected a readable file; check its permissions"
    assert capfd.readouterr() == ("", f"error: {right}\n")
    assert [path.name for path in unprivileged.iterdir()] == ["model.onnx"]


def test_unwritable_folder(unprivileged: Path, capfd: pytest.CaptureFixture[str]) -> None:
    unprivileged.chmod(0o500)
    assert run([*OPTIMIZE]) == 2
    said, complaint = capfd.readouterr()
    assert re.fullmatch(r"error: got .*; expected a writable folder; choose another.*\n", complaint), complaint
    assert (said, [path.name for path in unprivileged.iterdir()]) == ("", ["model.onnx"])


@pytest.mark.parametrize("kib", [0, 60])
def test_full_disk(kib: int, folder: Path, latencies: Path) -> None:
    """No file may grow beyond `kib`: what was measured may be lost, the input and an older result may not."""
    onnx.save(product_model("Gemm", [2, 300], [300, 250]), MODEL)
    Path("out.onnx").write_bytes(b"yesterday's")
    before = contents(folder)
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({kib << 10}, {kib << 10})); "
    done = subprocess.run(
        [COMMAND[0], "-c", limit + COMMAND[2], *OPTIMIZE, "--time-limit", "0.1"],
        env={**os.environ, CACHE_VARIABLE: str(latencies)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(r"error: got .*; expected .*; .*", done.stderr.splitlines()[-1])
    assert "Traceback" not in done.stderr
    assert contents(folder) == before
