"""A model above 2.2 GB, end to end: in time, in memory, and with its external data intact."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_model_above_two_gigabytes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.large", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    for file in tmp_path.glob("*.onnx*"):  # gigabytes that pytest would keep
        file.unlink()
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert row["gigabytes"] > 2.2
    assert row["matmuls"] >= 500
    assert row["seconds"] < 20 * 60
    assert row["peak_gigabytes"] < 6
    assert row["factorized"] >= 20
    assert row["kept"] == row["kept_equal"] == row["matmuls"] - row["factorized"]
