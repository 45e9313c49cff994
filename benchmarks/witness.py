"""What a script that knows nothing of onnx-lowrank says about two files: `independent.py`, in processes of its own.

Where the memory of a session happens to lie makes a small model a few percent faster or slower as long as its process
lives, so several processes time the same two files, and nothing else; their median counts.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SCRIPT = Path(__file__).with_name("independent.py")
PROCESSES = 5


@dataclass(frozen=True)
class Witnessed:
    """Medians over the processes: milliseconds before and after, and how many times as fast the second file is."""

    before_ms: float
    ms: float
    speedup: float


def witnessed(before: str, after: str, shapes: Sequence[str], seconds: float = 5.0) -> Witnessed:
    """Time two FILE@LEVEL in turns.

    Args:
        before: The first.
        after: The second.
        shapes: Words of the command line, `--shape x=1x3x8x8 ...`.
        seconds: Of every process, at least 30 rounds.
    """
    command = [sys.executable, str(SCRIPT), before, after, *shapes, "--seconds", f"{seconds:g}"]
    runs = [subprocess.run(command, check=True, capture_output=True, text=True) for _ in range(PROCESSES)]
    said = [json.loads(run.stdout) for run in runs]
    found = [
        statistics.median(values) for values in zip(*((*one["ms"], one["speedup"][1]) for one in said), strict=True)
    ]
    return Witnessed(*(round(value, 3) for value in found))
