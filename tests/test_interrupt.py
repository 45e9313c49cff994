"""Stopped at any moment: exit code 130, one line, and every folder as it was."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import product_model

from onnx_lowrank import cli
from onnx_lowrank.latency.table import CACHE_VARIABLE
from onnx_lowrank.progress import Advance, Phases

pytestmark = pytest.mark.usefixtures("quick")
# A shell may have made its children ignore the signal.
HEED = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
COMMAND = (sys.executable, "-c", f"{HEED}; from onnx_lowrank.cli import main; main()")
OPTIMIZE = ("optimize", "model.onnx", "-o", "out.onnx", "--threads", "1", "--keep-macs", "0.5", "--time-limit", "0.1")
PHASES = (
    *("read", "evaluate", "baseline", "normalize", "channel grid", "decompose", "search", "time chains"),
    *("write", "validate", "profile", "count"),
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder, with a model in it; temporary files go to `tmp` beside it."""
    work, scratch = tmp_path / "work", tmp_path / "tmp"
    for path in (work, scratch):
        path.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setenv("TMPDIR", str(scratch))
    onnx.save(product_model("Gemm", [2, 48], [48, 40]), "model.onnx")
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield tmp_path
    signal.signal(signal.SIGINT, previous)


def contents(folder: Path) -> dict[str, bytes | None]:
    """Path -> bytes of every file, None for folders; onnxruntime leaves a `.ses` where it first looks for a folder."""
    found = (path for path in folder.rglob("*") if path.name != ".ses")
    return {str(path): path.read_bytes() if path.is_file() else None for path in found}


def interrupted_in(wanted: str, seen: list[str], *, advancing: bool = False) -> Phases:
    """Phases that note their names and send SIGINT to this process when `wanted` starts, or first advances."""

    @contextlib.contextmanager
    def show(name: str) -> Generator[Advance]:
        seen.append(name)

        def advance(done: int, total: int) -> None:
            if advancing and name == wanted:
                os.kill(os.getpid(), signal.SIGINT)

        if name == wanted and not advancing:
            os.kill(os.getpid(), signal.SIGINT)
        yield advance

    return Phases(show)


def test_these_are_all_phases(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(cli, "phases_on", lambda _: interrupted_in("none", seen))
    assert cli.run([*OPTIMIZE]) in {0, 3}
    assert tuple(dict.fromkeys(seen)) == PHASES
    assert sorted(path.name for path in (folder / "work").iterdir()) == ["model.onnx", "out.onnx"]
    assert list((folder / "tmp").glob("onnx*")) == []


@pytest.mark.parametrize(
    ("command", "phase"),
    [("optimize", phase) for phase in PHASES] + [("plan", phase) for phase in PHASES[:8] if phase != "evaluate"],
)
def test_interrupted_in_phase(
    command: str, phase: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("out.onnx").write_bytes(b"yesterday's")
    before, seen = contents(folder), list[str]()
    monkeypatch.setattr(cli, "phases_on", lambda _: interrupted_in(phase, seen))
    assert cli.run([command, *OPTIMIZE[1:]]) == 130
    assert capfd.readouterr() == ("", "error: interrupted; what was not finished is gone\n")
    assert seen[-1] == phase
    assert contents(folder) == before


@pytest.mark.parametrize("phase", ["decompose", "time chains"])
def test_interrupted_while_a_phase_advances(
    phase: str, folder: Path, latencies: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(folder / "empty"))  # a chain known already is not timed
    cli.run([*OPTIMIZE, "--only", "nothing"])
    for path in (folder / "work").glob("out.*"):
        path.unlink()
    capfd.readouterr()
    seen: list[str] = []
    before = contents(folder / "work")
    monkeypatch.setattr(cli, "phases_on", lambda _: interrupted_in(phase, seen, advancing=True))
    assert cli.run([*OPTIMIZE]) == 130
    assert capfd.readouterr() == ("", "error: interrupted; what was not finished is gone\n")
    assert contents(folder / "work") == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_real_process_is_stopped(number: signal.Signals, code: int, folder: Path, latencies: Path) -> None:
    """The signal comes as soon as there is something to clear away."""
    big = np.random.default_rng(0).standard_normal((400, 400)).astype(np.float32)
    proto = product_model("Gemm", [64, 400], [400, 400])
    proto.graph.initializer[0].raw_data = big.tobytes()
    onnx.save(proto, "model.onnx")
    before = contents(folder / "work")
    started = subprocess.Popen(
        [*COMMAND, "optimize", "model.onnx", "-o", "out.onnx", "--speedup", "3"],
        env={**os.environ, CACHE_VARIABLE: str(latencies)},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list(Path().glob(".out.onnx-*")):
        assert started.poll() is None
        time.sleep(0.01)
    started.send_signal(number)
    _, complaint = started.communicate(timeout=60)
    assert started.returncode == code
    assert complaint == ("error: interrupted; what was not finished is gone\n" if number == signal.SIGINT else "")
    assert contents(folder / "work") == before
    assert list((folder / "tmp").glob("onnx*")) == []
