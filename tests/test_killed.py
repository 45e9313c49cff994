"""Killed at any moment and started again with the same table: the same model comes out."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from roads import network

from onnx_lowrank.latency.table import CACHE_VARIABLE

pytestmark = pytest.mark.slow
OPTIONS = ("--threads", "1", "--keep-macs", "0.5", "--seed", "3", "--calibration", "calibration.npz")
PATIENCE_S = 600


def started(folder: Path, table: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "onnx_lowrank", "optimize", "model.onnx", "-o", "out.onnx", *OPTIONS]
    environment = {**os.environ, CACHE_VARIABLE: str(table)}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def made_in(folder: Path) -> Path:
    """A folder with a model and samples."""
    folder.mkdir()
    onnx.save(network(), folder / "model.onnx")
    images = np.random.default_rng(0).standard_normal((48, 3, 16, 16)).astype(np.float32)
    np.savez(folder / "calibration.npz", image=images)
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    work = made_in(tmp_path_factory.mktemp("undisturbed") / "work")
    assert started(work, work.parent / "table").wait(PATIENCE_S) == 0
    return (work / "out.onnx").read_bytes()


def rows(table: Path, where: str) -> int:
    """How many rows of the table there are, none where it does not exist yet."""
    with contextlib.suppress(sqlite3.OperationalError):
        connection = sqlite3.connect(f"file:{table / 'latency.sqlite'}?mode=ro", uri=True)
        with contextlib.closing(connection):
            return int(connection.execute(f"SELECT count(*) FROM {where}").fetchone()[0])
    return 0


MOMENTS: dict[str, Callable[[Path, Path], bool]] = {
    "two losses are known": lambda _, table: rows(table, "fact WHERE key LIKE 'loss %'") >= 2,
    "five chains are timed": lambda _, table: rows(table, "latency WHERE median_ms IS NOT NULL") >= 5,
    "the refit has begun": lambda work, _: any(work.rglob("refit-*/original/*.npy")),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_started_again(moment: str, undisturbed: bytes, tmp_path: Path) -> None:
    work, table = made_in(tmp_path / "work"), tmp_path / "table"
    victim, deadline = started(work, table), time.monotonic() + PATIENCE_S
    while not MOMENTS[moment](work, table):
        assert victim.poll() is None, "over before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    victim.kill()
    assert victim.wait(PATIENCE_S) != 0
    assert not (work / "out.onnx").exists()
    assert started(work, table).wait(PATIENCE_S) == 0
    assert (work / "out.onnx").read_bytes() == undisturbed
