"""Killed at any moment and started again with the same table: the same model comes out."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Moment:
    """When a run is killed."""

    come: Callable[[Path, Path], bool]
    """Of the folder and the table: it is time."""
    forgotten: tuple[str, ...]
    """Rows of a finished run's table, `NAME WHERE CONDITION`, that the victim does not find there."""


LOSSES, TIMES = "fact WHERE key LIKE 'loss %'", "latency WHERE median_ms IS NOT NULL"
MOMENTS = {
    "two losses are known": Moment(lambda _, table: rows(table, LOSSES) >= 2, (LOSSES,)),
    "five chains are timed": Moment(lambda _, table: rows(table, TIMES) >= 5, (LOSSES, TIMES)),
    "the refit has begun": Moment(lambda work, _: any(work.rglob("refit-*/original/*.npy")), ()),
}


@dataclass(frozen=True)
class Finished:
    """A run that nobody disturbed, and the table it leaves."""

    table: Path
    model: bytes


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    table = tmp_path_factory.mktemp("undisturbed") / "table"
    return Finished(table, finished(made_in(table.parent / "work"), table))


def finished(work: Path, table: Path) -> bytes:
    """The model that a run which is let alone writes."""
    assert started(work, table).wait(PATIENCE_S) == 0
    return (work / "out.onnx").read_bytes()


def connected(table: Path, mode: str) -> contextlib.closing[sqlite3.Connection]:
    return contextlib.closing(sqlite3.connect(f"file:{table / 'latency.sqlite'}?mode={mode}", uri=True))


def rows(table: Path, where: str) -> int:
    """How many rows of the table there are, none where it does not exist yet."""
    with contextlib.suppress(sqlite3.OperationalError), connected(table, "ro") as connection:
        return int(connection.execute(f"SELECT count(*) FROM {where}").fetchone()[0])
    return 0


def losses(table: Path) -> dict[str, str]:
    with connected(table, "ro") as connection:
        return dict(connection.execute("SELECT key, value FROM fact WHERE key LIKE 'loss %'"))


def forget(table: Path, where: str) -> None:
    with connected(table, "rw") as connection, connection:
        assert connection.execute(f"DELETE FROM {where}").rowcount > 0


@pytest.mark.parametrize("name", MOMENTS)
def test_killed_and_started_again(name: str, undisturbed: Finished, tmp_path: Path) -> None:
    moment, work, table = MOMENTS[name], made_in(tmp_path / "work"), tmp_path / "table"
    shutil.copytree(undisturbed.table, table)
    for where in moment.forgotten:
        forget(table, where)
    victim, deadline = started(work, table), time.monotonic() + PATIENCE_S
    while not moment.come(work, table):
        assert victim.poll() is None, "over before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    victim.kill()
    assert victim.wait(PATIENCE_S) != 0
    assert not (work / "out.onnx").exists()
    resumed = finished(work, table)
    # Times that were measured anew are other times: what is promised is the model of a run with this very table.
    expected = finished(made_in(tmp_path / "again"), table) if TIMES in moment.forgotten else undisturbed.model
    assert resumed == expected
    # And no loss that was remembered when the kill came is another one.
    known, before = losses(table), losses(undisturbed.table)
    assert known.keys() & before.keys()
    assert all(known[key] == before[key] for key in known.keys() & before.keys())
