"""Does the same goal give the same speed again: `optimize` several times over, with a latency table that is empty.

    python -m benchmarks.repeatability [MODEL ...] [--speedup 2] [--times 5] [--disturbed]

Every run is a process of its own with an empty table. The finished models are then timed, each in turns with the
original, by `independent.py`, which knows nothing of onnx-lowrank. `--disturbed` runs everything of a run on one core,
on which a busy loop takes half of the time; the witness times undisturbed. Rows go to
`benchmarks/results/repeatability.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from pathlib import Path

from benchmarks import command
from benchmarks.fashion import NETS
from benchmarks.witness import witnessed
from benchmarks.zoo import results
from benchmarks.zoo.cache import default_cache
from benchmarks.zoo.model import ZooModel
from benchmarks.zoo.models import all_models

MODELS = ("embedded", "hed")
KEYS = ("model", "goal", "run", "core_disturbed")
COLUMNS = (*KEYS, "speedup", "ci95", "independent", "phase_time_chains", "seconds", "disturbed", "goal_reached")
BUSY = 0.05  # seconds of work, then as many of rest


def main(words: Sequence[str] | None = None) -> int:
    """Run, time, record, and print the table with the spread of each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--speedup", type=float, default=2.0)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--disturbed", action="store_true")
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    asked = parser.parse_args(words)
    for name in asked.models:
        model = {**all_models(), **NETS}[name]
        with tempfile.TemporaryDirectory() as folder:
            rows = repeated(model, asked.speedup, asked.times, Path(folder), disturbed=asked.disturbed)
        for row in rows:
            results.put("repeatability", row, KEYS, asked.results)
        print(results.table(rows, COLUMNS))
        witnessed = [float(str(row["independent"])) for row in rows]
        own = [abs(float(str(row["speedup"])) / float(str(row["independent"])) - 1) for row in rows]
        spread = max(witnessed) / min(witnessed) - 1
        print(f"{name}: speeds differ by {spread:.1%}, the report from the witness by {max(own):.1%} at most\n")
    return 0


def repeated(
    model: ZooModel, speedup: float, times: int, folder: Path, *, disturbed: bool
) -> list[dict[str, results.Scalar]]:
    """One row per run; the results are timed at the end."""
    original = model.build(default_cache())
    shapes = [word for shape in model.inputs for word in ("--shape", shape)]
    options = [*shapes, "--threads", "1", "--speedup", f"{speedup:g}"]
    rows: list[dict[str, results.Scalar]] = []
    pairs: list[tuple[str, str]] = []
    for number in range(times):
        own = folder / str(number)
        own.mkdir()
        with _half_busy() if disturbed else contextlib.nullcontext():
            run = command.optimize(original, own / "out.onnx", options, {"ONNX_LOWRANK_CACHE": str(own / "cache")})
        if not run.written:
            raise SystemExit(f"{model.name}, run {number}: {run.error}")
        levels = run.report["latency"]["levels"]
        pairs.append((f"{original}@{levels['before']}", f"{run.out}@{levels['after']}"))
        row: dict[str, results.Scalar] = {"model": model.name, "goal": f"speedup {speedup:g}", "run": number}
        rows.append({**row, "core_disturbed": disturbed, **run.figures(), **run.costs()})
    for row, pair in zip(rows, pairs, strict=True):
        found = witnessed(*pair, shapes)
        row |= {"independent": found.speedup, "independent_ms": found.ms}
    return rows


@contextlib.contextmanager
def _half_busy() -> Generator[None]:
    """This process and its children on one core, where another process works for half of the time."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    other = multiprocessing.Process(target=_work_and_rest, daemon=True)
    other.start()
    try:
        yield
    finally:
        other.kill()
        other.join()
        os.sched_setaffinity(0, allowed)


def _work_and_rest() -> None:
    while True:
        until = time.perf_counter() + BUSY
        while time.perf_counter() < until:
            pass
        time.sleep(BUSY)


if __name__ == "__main__":
    sys.exit(main())
