"""Does one goal over several weighted shapes hold: each shape is timed by a script that knows nothing of onnx-lowrank.

    python -m benchmarks.weighted_shapes [ocr_rec minilm] [--speedup 2]

The weighted speedup of the witness is sum w ms before / sum w ms after, both at the levels that the report recommends.
Rows go to `benchmarks/results/weighted_shapes.json`: one per shape, and one for all of them together.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import command
from benchmarks.witness import witnessed
from benchmarks.zoo import results
from benchmarks.zoo.cache import default_cache
from benchmarks.zoo.models import all_models

KEYS = ("model", "goal", "shape")
COLUMNS = (*KEYS, "weight", "independent_before_ms", "independent_ms", "independent", "speedup", "ci95", "goal_reached")
CASES: dict[str, tuple[tuple[float, tuple[str, ...]], ...]] = {
    "ocr_rec": ((3, ("x=1x3x48x320",)), (1, ("x=1x3x48x640",))),
    "minilm": ((3, ("input_ids=1x32", "attention_mask=1x32")), (1, ("input_ids=1x128", "attention_mask=1x128"))),
}


def main(words: Sequence[str] | None = None) -> int:
    """Optimize, time, record, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(CASES), metavar="MODEL", help=", ".join(CASES))
    parser.add_argument("--speedup", type=float, default=2.0)
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    asked = parser.parse_args(words)
    for name in asked.models:
        with tempfile.TemporaryDirectory() as folder:
            rows = weighted(name, asked.speedup, Path(folder))
        for row in rows:
            results.put("weighted_shapes", row, KEYS, asked.results)
        print(results.table(rows, COLUMNS))
    return 0


def weighted(name: str, speedup: float, folder: Path) -> list[dict[str, results.Scalar]]:
    """Rows of one model, calibrated: each shape by the witness, then the whole by the report and by the witness."""
    model, shapes = all_models()[name], CASES[name]
    original = model.build(default_cache())
    options = [word for weight, sizes in shapes for size in sizes for word in ("--shape", f"{size}*{weight:g}")]
    calibration = ["--calibration", str(original.with_name("calibration.npz"))]
    run = command.optimize(
        original, folder / "out.onnx", [*options, *calibration, "--threads", "1", "--speedup", f"{speedup:g}"]
    )
    if not run.written:
        raise SystemExit(f"{name}: {run.error}")
    levels = run.report["latency"]["levels"]
    files = (f"{original}@{levels['before']}", f"{run.out}@{levels['after']}")
    rows: list[dict[str, results.Scalar]] = []
    before = after = 0.0
    for weight, sizes in shapes:
        words = [word for size in sizes for word in ("--shape", size)]
        timed = witnessed(*files, words)
        before, after = before + weight * timed.before_ms, after + weight * timed.ms
        rows.append({"shape": " ".join(sizes), "weight": weight, "independent": timed.speedup})
        rows[-1] |= {"independent_before_ms": timed.before_ms, "independent_ms": timed.ms}
    total = sum(weight for weight, _ in shapes)
    together = {"independent_before_ms": round(before / total, 3), "independent_ms": round(after / total, 3)}
    whole = {"shape": "weighted", "weight": total, **together, "independent": round(before / after, 3)}
    rows.append({**whole, **run.figures(), **run.costs()})
    return [{"model": name, "goal": f"speedup {speedup:g}", **row} for row in rows]


if __name__ == "__main__":
    sys.exit(main())
