"""`onnx-lowrank optimize` and `compare` as benchmarks run them: in a process of its own, what it found read back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.zoo.results import Scalar

LATE = "no result within"  # so many seconds: the reason of a process that was ended
DONE, MISSED = 0, 3  # exit codes with a written model: goal reached, or not


@dataclass(frozen=True)
class Run:
    """One run of the command.

    Attributes:
        out: The model it wrote, if it did.
        exit: Its exit code.
        seconds: Wall time of the process.
        error: The last line it said, where no model was written.
        report: `report.json`, parsed; empty where there is none.
    """

    out: Path
    exit: int
    seconds: float
    error: str
    report: Mapping[str, Any]

    @property
    def written(self) -> bool:
        """Whether there is a model."""
        return bool(self.report)

    def figures(self) -> dict[str, Scalar]:
        """What the report says about speed, size and fidelity, as flat columns."""
        if not self.written:
            return {"exit": self.exit, "seconds": self.seconds, "error": self.error}
        latency, size, layers = (self.report[key] for key in ("latency", "size", "layers"))
        goal, fidelity = self.report["goal"], self.report["fidelity"]
        return {
            "exit": self.exit,
            "seconds": self.seconds,
            "before_ms": round(latency["before_ms"], 3),
            "after_ms": round(latency["after_ms"], 3),
            "predicted_ms": round(latency["predicted_ms"], 3),
            "predicted_low_rank_speedup": round(latency["predicted_low_rank_speedup"], 3),
            "speedup": round(latency["speedup"], 3),
            "ci95": span(latency["ci95"]),
            "low_rank_speedup": round(latency["low_rank_speedup"], 3),
            "clock": str(latency["clock"]),
            "disturbed": bool(latency["disturbed"]),
            "macs_kept": round(size["macs_after"] / max(size["macs_before"], 1), 4),
            "params_kept": round(size["params_after"] / max(size["params_before"], 1), 4),
            "factorized": sum(row["decision"] == "factorized" for row in layers),
            "weight_nodes": len(layers),
            "relative_error": float(f"{fidelity['relative_error']:.3g}"),
            "worst_output": float(f"{max(output['relative'] for output in fidelity['outputs']):.3g}"),
            "goal_reached": bool(goal["reached"]),
        }

    def costs(self) -> dict[str, Scalar]:
        """Seconds of each phase, peak memory, and what the model was calibrated on."""
        if not self.written:
            return {}
        phases = {
            f"phase_{name.replace(' ', '_')}": round(float(seconds), 2)
            for name, seconds in self.report["timings"].items()
        }
        peak = self.report["peak_rss_mib"]
        return {
            **phases,
            **({} if peak is None else {"peak_rss_mib": round(peak)}),
            "calibration": str(self.report["calibration"]),
        }


def optimize(model: Path, out: Path, options: Sequence[str], environment: Mapping[str, str] | None = None) -> Run:
    """Optimize a model; the report is written beside `out`, whose folder must exist.

    Args:
        model: The original.
        out: Receives the result.
        options: All further words.
        environment: Variables beside those of this process.
    """
    command = [sys.executable, "-m", "onnx_lowrank", "optimize", str(model), "-o", str(out), *options]
    variables = {**os.environ, **(environment or {})}
    started = time.perf_counter()
    done = subprocess.run(
        [*command, "--report", str(out.parent)], capture_output=True, text=True, check=False, env=variables
    )
    seconds = round(time.perf_counter() - started, 1)
    said = done.stderr.strip().splitlines()
    file = out.parent / "report.json"
    written = done.returncode in {DONE, MISSED} and out.is_file()
    report = json.loads(file.read_text("utf-8")) if written else {}
    return Run(out, done.returncode, seconds, "" if written else (said or ["no output"])[-1], report)


@dataclass(frozen=True)
class Compared:
    """One run of `compare`.

    Attributes:
        seconds: Wall time of the process.
        error: Why there is no result; empty where there is one.
        found: The JSON it printed; empty where there is none.
    """

    seconds: float
    error: str
    found: Mapping[str, Any]


def compare(model: Path, models: Path, options: Sequence[str], limit_s: float) -> Compared:
    """Compare the formats of a model.

    Args:
        model: The original.
        models: Folder that receives the networks.
        options: All further words.
        limit_s: The process is ended after so many seconds.
    """
    command = [sys.executable, "-m", "onnx_lowrank", "compare", str(model), "--models", str(models), "--json"]
    started = time.perf_counter()
    try:
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=False, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return Compared(round(time.perf_counter() - started, 1), f"{LATE} {limit_s:.0f} s", {})
    seconds, said = round(time.perf_counter() - started, 1), done.stderr.strip().splitlines()
    if done.returncode != DONE:
        return Compared(seconds, (said or ["no output"])[-1], {})
    return Compared(seconds, "", json.loads(done.stdout))


def span(interval: Sequence[float], places: int = 3) -> str:
    """An interval in words."""
    return f"{interval[0]:.{places}f} to {interval[1]:.{places}f}"
