"""Run the main job on the models of the zoo and record what it gained and cost.

    python -m benchmarks.optimize_zoo --name speedup_1.5 -- --speedup 1.5
    python -m benchmarks.optimize_zoo --name full_rank --no-metric -- --allocator full_rank --max-error 1e-4

What stands behind the `--` is handed to `onnx-lowrank optimize`. Each model is optimized by the command
line in a process of its own, then the written file is evaluated against the original on the model's task.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.zoo import results
from benchmarks.zoo.cache import default_cache
from benchmarks.zoo.evaluate import evaluate
from benchmarks.zoo.model import ZooModel
from benchmarks.zoo.models import all_models

Row = dict[str, str | int | float | bool | None]


def main() -> int:
    """Optimize, evaluate, write `benchmarks/results/<name>.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="names; all by default")
    parser.add_argument("--name", required=True, help="of the result file")
    parser.add_argument("--no-metric", action="store_true", help="do not evaluate the task metric")
    parser.add_argument("--threads", default="1")
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    known, options = parser.parse_args(sys.argv[1:at]), sys.argv[at + 1 :]
    chosen = [all_models()[name] for name in known.models] if known.models else list(all_models().values())
    rows = _recorded(known.name)
    for model in chosen:
        row = optimize(model, ["--threads", known.threads, *options], metric=not known.no_metric)
        rows = [old for old in rows if old["model"] != model.name] + [row]
        print(json.dumps(row), flush=True)
        results.write(known.name, rows)
    return int(any(row["exit"] not in {0, 3} for row in rows))


def optimize(model: ZooModel, options: list[str], *, metric: bool) -> Row:
    """One model through the command line; the row of the result file."""
    cache = default_cache()
    original = model.build(cache)
    shapes = [word for shape in model.inputs for word in ("--shape", shape)]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.onnx"
        command = [sys.executable, "-m", "onnx_lowrank", "optimize", str(original), "-o", str(out), *shapes, *options]
        start = time.perf_counter()
        done = subprocess.run([*command, "--report", folder], capture_output=True, text=True, check=False)
        row: Row = {"model": model.name, "options": " ".join(options), "exit": done.returncode}
        row["seconds"] = round(time.perf_counter() - start, 1)
        if not out.exists():
            return row | {"error": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no output"}
        report = json.loads((Path(folder) / "report.json").read_text("utf-8"))
        row |= _figures(report)
        if metric:
            found = evaluate(model, cache, out)
            for name, value in found.metrics.items():
                row |= {name: round(value.value, 4), f"{name}_drop_ci95": _span(value.drop_ci95)}
    return row


def _figures(report: dict[str, Any]) -> Row:
    latency, size, layers = report["latency"], report["size"], report["layers"]
    return {
        "before_ms": round(latency["before_ms"], 3),
        "after_ms": round(latency["after_ms"], 3),
        "predicted_ms": round(latency["predicted_ms"], 3),
        "predicted_low_rank_speedup": round(latency["predicted_low_rank_speedup"], 3),
        "speedup": round(latency["speedup"], 3),
        "ci95": _span(latency["ci95"]),
        "low_rank_speedup": round(latency["low_rank_speedup"], 3),
        "clock": str(latency["clock"]),
        "disturbed": bool(latency["disturbed"]),
        "macs_kept": round(size["macs_after"] / max(size["macs_before"], 1), 3),
        "params_kept": round(size["params_after"] / max(size["params_before"], 1), 3),
        "factorized": sum(row["decision"] == "factorized" for row in layers),
        "weight_nodes": len(layers),
        "relative_error": float(f"{report['fidelity']['relative_error']:.3g}"),
        "worst_output": float(f"{max(output['relative'] for output in report['fidelity']['outputs']):.3g}"),
        "goal_reached": bool(report["goal"]["reached"]),
    }


def _span(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.3f} to {interval[1]:.3f}"


def _recorded(name: str) -> list[Row]:
    path = results.FOLDER / f"{name}.json"
    return json.loads(path.read_text("utf-8"))["rows"] if path.is_file() else []


if __name__ == "__main__":
    sys.exit(main())
