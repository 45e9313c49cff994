"""Where plain alternating least squares makes CP degenerate, and what the error-preserving correction does about it.

    python -m benchmarks.degeneracy [MODEL ...] [--most 4] [--largest 150000] [--keep 0.25 0.5]

For each layer and share of its weights, CP is fitted plainly (no terms of lower ranks, one spectral and one random
start, to convergence) and then corrected with 1 % of slack, until the squared terms add up to 2 ||W||^2. Degeneracy is
sum_r ||term_r||^2 / ||W||^2. Rows go to `benchmarks/results/degeneracy.json` as they come; the first group of grouped
layers stands for all.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks.zoo import results
from benchmarks.zoo.cache import default_cache
from benchmarks.zoo.models import all_models
from onnx_lowrank.graph import io
from onnx_lowrank.graph.layers import layers
from onnx_lowrank.layer import Layer
from onnx_lowrank.passes.decompose.cp import CALM, SLACK, Cp, CpBase, CpSpatial
from onnx_lowrank.passes.decompose.cp_als import Problem

ASSETS = Path(__file__).resolve().parent.parent / "onnx_lowrank" / "assets"
EMBEDDED = "embedded"
MODELS = (EMBEDDED, "hed", "ocr_det")
DEGENERATE = 10.0
SWEEPS, TOLERANCE = 150, 1e-5
KEYS = ("model", "layer", "method", "rank")
COLUMNS = (*KEYS, "shape", "als_error", "als_degeneracy", "error", "degeneracy", "fell", "error_percent", "seconds")


def main(words: Sequence[str] | None = None) -> int:
    """Fit, correct, record; print the table and how the degenerate ones fared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, help="of the zoo, or the one in the package (%(default)s)")
    parser.add_argument("--most", type=int, default=4, help="layers per model, the largest ones (%(default)s)")
    parser.add_argument("--largest", type=int, default=150_000, help="weights of a layer at most (%(default)s)")
    parser.add_argument("--keep", type=float, nargs="+", default=(0.25, 0.5), help="shares of the layer's weights")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="folder of the result file (%(default)s)")
    asked = parser.parse_args(words)
    rows: list[results.Row] = []
    with threadpool_limits(1):
        for row in _rows(asked):
            rows.append(row)
            print("  ".join(f"{key} {row[key]}" for key in COLUMNS), flush=True)
            results.put("degeneracy", row, KEYS, asked.results)
    print(results.table(rows, COLUMNS))
    worst = [row for row in rows if float(str(row["als_degeneracy"])) > DEGENERATE]
    fell = sum(float(str(row["fell"])) >= 5 for row in worst)
    print(f"{len(worst)} of {len(rows)} fits degenerate; corrected at least fivefold: {fell}")
    return 0


def _rows(asked: argparse.Namespace) -> Iterator[results.Row]:
    for name in asked.models:
        path = ASSETS / "fashion_resnet.onnx" if name == EMBEDDED else all_models()[name].build(default_cache())
        found = layers(io.load(path))[0]
        for method in (Cp(), CpSpatial()):
            fitting = [layer for layer in found if _worth(layer, method, asked.largest)]
            for layer in sorted(fitting, key=lambda layer: -layer.shape.params)[: asked.most]:
                for keep in asked.keep:
                    yield {"model": name, **measure(layer, method, keep)}


def _worth(layer: Layer, method: CpBase, largest: int) -> bool:
    return method.refusal(layer.shape) is None and layer.shape.params // layer.shape.groups <= largest


def measure(layer: Layer, method: CpBase, keep: float) -> results.Row:
    """One layer, method and share of the weights."""
    shape, weight = layer.shape, layer.read()[0].astype(np.float64)
    sizes = [int(np.prod([shape.kernel[axis] for axis in axes])) for axes in method.axes(shape)]
    problem = Problem(weight.reshape(shape.out, shape.in_, *sizes))
    rank = max(2, int(keep * shape.out * shape.inputs / (shape.out + shape.in_ + sum(sizes))))
    start, rng = time.perf_counter(), np.random.default_rng(0)
    plain = problem.als([problem.spectral(rank, rng), problem.random(rank, rng)], SWEEPS, TOLERANCE)
    better = problem.corrected(plain, SLACK, CALM)
    errors = problem.error(plain), problem.error(better)
    degeneracies = problem.degeneracy(plain), problem.degeneracy(better)
    return {
        "layer": layer.nodes[0],
        "shape": str(shape),
        "method": method.name,
        "rank": rank,
        "als_error": round(errors[0], 4),
        "als_degeneracy": round(degeneracies[0], 2),
        "error": round(errors[1], 4),
        "degeneracy": round(degeneracies[1], 2),
        "fell": round(degeneracies[0] / degeneracies[1], 1),
        "error_percent": round(100 * (errors[1] / errors[0] - 1), 2),
        "seconds": round(time.perf_counter() - start, 1),
    }


if __name__ == "__main__":
    sys.exit(main())
