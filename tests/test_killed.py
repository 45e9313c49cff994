"""Killed at any moment and started again with the same table: the same model comes out."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from roads import network

from onnx_lowrank.latency.table import CACHE_VARIABLE

OPTIONS = ("--threads", "1", "--keep-macs", "0.5", "--seed", "3", "--calibration", "calibration.npz")


def started(folder: Path, table: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "onnx_lowrank", "optimize", "model.onnx", "-o", "out.onnx", *OPTIONS]
    environment = {**os.environ, CACHE_VARIABLE: str(table)}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.5, 0.75, 0.9])
def test_killed_and_started_again(share: float, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    onnx.save(network(), work / "model.onnx")
    images = np.random.default_rng(0).standard_normal((48, 3, 16, 16)).astype(np.float32)
    np.savez(work / "calibration.npz", image=images)
    start = time.perf_counter()
    assert started(work, tmp_path / "undisturbed").wait(120) == 0
    seconds = time.perf_counter() - start
    wanted = (work / "out.onnx").read_bytes()
    (work / "out.onnx").unlink()
    victim = started(work, tmp_path / "killed")
    time.sleep(share * seconds)
    victim.kill()
    victim.wait(120)
    assert started(work, tmp_path / "killed").wait(120) == 0
    assert (work / "out.onnx").read_bytes() == wanted
