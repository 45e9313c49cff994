"""How well latencies are predicted: `predicted_ms` against what the finished model was then measured to take.

    python -m benchmarks.prediction [MODEL ...] [--keep 0.8 0.6 0.4] [--threads 1 2]

Every row is `onnx-lowrank optimize --keep-macs K --of factorable`, data-free, in a process of its own; rows go to
`benchmarks/results/prediction.json` as they come. The error is that of the share of the normalized model's latency:
predicted before the finished model was first timed, measured in turns with the normalized model. Beside it stands what
chains and layers timed alone would have said: the normalized model's latency, less the layers', plus the chains'.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import command
from benchmarks.zoo import results
from benchmarks.zoo.cache import default_cache
from benchmarks.zoo.model import ZooModel
from benchmarks.zoo.models import all_models

MODELS = ("hed", "minilm", "crepe_full", "open_nsfw", "efficientnet", "ocr_rec")
KEYS = ("model", "keep_macs", "threads")
COLUMNS = (
    *KEYS,
    "measured_ms",
    "predicted_ms",
    "error_percent",
    "isolated_percent",
    "speedup",
    "disturbed",
    "seconds",
    "error",
)


def main(words: Sequence[str] | None = None) -> int:
    """Measure, record, and print the table with the median and the worst error; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, help="of the zoo (default: %(default)s)")
    parser.add_argument("--keep", type=float, nargs="+", default=(0.8, 0.6, 0.4), help="shares of the MACs")
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="folder of the result file (%(default)s)")
    asked = parser.parse_args(words)
    rows: list[results.Row] = []
    for row in _rows(asked):
        rows.append(row)
        print("  ".join(f"{key} {row[key]}" for key in COLUMNS if key in row), flush=True)
        if "error" not in row:
            results.put("prediction", row, KEYS, asked.results)
    print(results.table(rows, COLUMNS))
    errors = [abs(float(str(row["error_percent"]))) for row in rows if "error_percent" in row]
    if errors:
        print(f"{len(errors)} models: median error {statistics.median(errors):.1f} %, worst {max(errors):.1f} %")
    return int(len(errors) < len(rows))


def _rows(asked: argparse.Namespace) -> Iterator[results.Row]:
    for name in asked.models:
        for threads in asked.threads:
            for keep in asked.keep:
                yield measure(all_models()[name], keep, threads)


def measure(model: ZooModel, keep: float, threads: int) -> results.Row:
    """One row: optimize, and compare what was predicted with what was measured."""
    original = model.build(default_cache())
    options = [word for shape in model.inputs for word in ("--shape", shape)]
    options += ["--threads", str(threads), "--keep-macs", f"{keep:g}", "--of", "factorable"]
    row: dict[str, results.Scalar] = {"model": model.name, "keep_macs": keep, "threads": threads}
    with tempfile.TemporaryDirectory() as folder:
        run = command.optimize(original, Path(folder) / "out.onnx", options)
    figures = run.figures()
    if "error" in figures:
        return {**row, "error": figures["error"]}
    predicted, measured = float(str(figures["predicted_ms"])), float(str(figures["after_ms"]))
    row |= {"measured_ms": measured, "predicted_ms": predicted}
    row |= {"error_percent": _percent(predicted, measured), "isolated_percent": _percent(_isolated(run), measured)}
    return row | {key: figures[key] for key in ("speedup", "ci95", "clock", "disturbed", "seconds")}


def _isolated(run: command.Run) -> float:
    """What the report's latencies of layers and chains, each timed alone, add up to."""
    layers = [row for row in run.report["layers"] if row["latency_ms_after"] is not None]
    gain = sum(row["latency_ms_before"] - row["latency_ms_after"] for row in layers)
    return float(run.report["latency"]["normalized_ms"]) - gain


def _percent(predicted: float, measured: float) -> float:
    return round(100 * (predicted / measured - 1), 1)


if __name__ == "__main__":
    sys.exit(main())
