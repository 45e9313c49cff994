r"""Run the main job on the models of the zoo and record what it gained and cost.

    python -m benchmarks.optimize_zoo --name speedup_1.5 -- --speedup 1.5
    python -m benchmarks.optimize_zoo --name full_rank --no-metric -- --allocator full_rank --max-error 1e-4
    python -m benchmarks.optimize_zoo basic_pitch --name full_rank --no-metric --calibrated -- --allocator full_rank \
        --max-error 1e-4

What stands behind the `--` is handed to `onnx-lowrank optimize`. Each model is optimized by the command
line in a process of its own, then the written file is evaluated against the original on the model's task.

basic_pitch takes logarithms of powers near zero and scales them by their extremes: on synthetic noise the original
itself differs by up to 4e-4 between two optimization levels of onnxruntime. Its error is measured on audio therefore.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from benchmarks import command
from benchmarks.command import span
from benchmarks.zoo import results
from benchmarks.zoo.cache import default_cache
from benchmarks.zoo.evaluate import evaluate
from benchmarks.zoo.model import ZooModel
from benchmarks.zoo.models import all_models


def main() -> int:
    """Optimize, evaluate, write `benchmarks/results/<name>.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="names; all by default")
    parser.add_argument("--name", required=True, help="of the result file")
    parser.add_argument("--no-metric", action="store_true", help="do not evaluate the task metric")
    parser.add_argument("--calibrated", action="store_true", help="give each model its calibration.npz")
    parser.add_argument("--threads", default="1")
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    known, options = parser.parse_args(sys.argv[1:at]), sys.argv[at + 1 :]
    chosen = [all_models()[name] for name in known.models] if known.models else list(all_models().values())
    failed = 0
    for model in chosen:
        wanted = ["--threads", known.threads, *options]
        row = optimize(model, wanted, metric=not known.no_metric, calibrated=known.calibrated)
        failed += row["exit"] not in {command.DONE, command.MISSED}
        print(json.dumps(row), flush=True)
        results.put(known.name, row, keys=("model",))
    return int(failed > 0)


def optimize(
    model: ZooModel, options: list[str], *, metric: bool, calibrated: bool = False
) -> dict[str, results.Scalar]:
    """One model through the command line; the row of the result file."""
    cache = default_cache()
    original = model.build(cache)
    given = [word for shape in model.inputs for word in ("--shape", shape)]
    if calibrated:
        given += ["--calibration", str(original.with_name("calibration.npz"))]
    with tempfile.TemporaryDirectory() as folder:
        run = command.optimize(original, Path(folder) / "out.onnx", [*given, *options])
        said = [*options, *(["--calibration", "calibration.npz"] if calibrated else [])]
        row: dict[str, results.Scalar] = {"model": model.name, "options": " ".join(said), **run.figures()}
        if metric and run.written:
            for name, found in evaluate(model, cache, run.out).metrics.items():
                row |= {name: round(found.value, 4), f"{name}_drop_ci95": span(found.drop_ci95)}
    return row


if __name__ == "__main__":
    sys.exit(main())
