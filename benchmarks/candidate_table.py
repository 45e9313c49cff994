"""Time of the candidate table against bare SVDs of the same unfoldings.

    python -m benchmarks.candidate_table [MODEL] [--turns 1]

The table holds the error of every rank of every format that is not fitted rank by rank by iteration; no chain is timed
for it. Against it stands one LAPACK SVD (numpy's, thin, both sides' vectors) of every unfolding of a weight that these
formats cut, in single precision, as the weights are (the table is made in double). Both have one processor and one BLAS
thread and are measured by that thread's clock, in turns, each in a process of its own. Peak memory is that of the table
with all processors, which decomposes several layers at once.

Every turn adds a row to `benchmarks/results/candidate_table.json`; "median" is the row of all turns so far, with the
95 % interval of the ratio's median.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks.zoo import results
from benchmarks.zoo.cache import default_cache
from benchmarks.zoo.models import all_models
from onnx_lowrank.candidates import Grid
from onnx_lowrank.catalogue import all_decompositions
from onnx_lowrank.decomposition import Decomposition
from onnx_lowrank.graph import io
from onnx_lowrank.graph.check import inferred_shapes
from onnx_lowrank.graph.layers import layers, shapes_as_trace
from onnx_lowrank.latency.estimate import ratio_of
from onnx_lowrank.layer import Array, Layer, Shape
from onnx_lowrank.passes.decompose.two_stage import TwoStage
from onnx_lowrank.search.factorizations import FactorizationCache
from onnx_lowrank.search.table import tabulate
from onnx_lowrank.settings import Settings

# Alternating least squares or orthogonal iteration at every rank.
ITERATIVE = {"block_term", "cp", "cp_spatial", "semi_tensor", "semi_tensor_ring", "semi_tensor_train", "tensor_ring"}
BLOCK = 16  # channels, as AVX-512 kernels have them
NAME = "candidate_table"
KEYS = ("model", "turn")
MEDIAN = "median"
Measured = tuple[float, int, float]


def main(words: Sequence[str] | None = None) -> int:
    """Measure in turns, record, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="hed", help="of the zoo (%(default)s)")
    parser.add_argument("--turns", type=int, default=1, help="to be added to those on record (%(default)s)")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="folder of the result file (%(default)s)")
    asked = parser.parse_args(words)
    named = all_models()[asked.model]
    path, shapes = named.build(default_cache()), dict(_size(text) for text in named.inputs)
    for _ in range(asked.turns):
        rows = [row for row in results.recorded(NAME, asked.results) if row["model"] == asked.model]
        rows = [row for row in rows if row["turn"] != MEDIAN]
        rows.append({"model": asked.model, "turn": str(len(rows) + 1), **turn(path, shapes)})
        for row in (rows[-1], {"model": asked.model, "turn": MEDIAN, **median(rows)}):
            results.put(NAME, row, KEYS, asked.results)
    print(results.table(results.recorded(NAME, asked.results)))
    return 0


def turn(path: Path, shapes: dict[str, Shape]) -> results.Row:
    """Everything once."""
    _, _, peak = _alone(table, path, shapes, "all")
    seconds, candidates, _ = _alone(table, path, shapes, "one")
    svd_seconds, unfolded, _ = _alone(bare, path, shapes)
    return {
        "candidates": candidates,
        "unfoldings": unfolded,
        "table_seconds": round(seconds, 2),
        "svd_seconds": round(svd_seconds, 2),
        "ratio": round(seconds / svd_seconds, 3),
        "peak_mib": round(peak),
    }


def median(rows: Sequence[results.Row]) -> results.Row:
    """Median of every number, and the interval of the ratio."""
    numbers = {key: [float(str(row[key])) for row in rows] for key in rows[0] if key not in KEYS}
    ratio = ratio_of(np.array(numbers["ratio"]))
    return {
        **{key: round(float(np.median(values)), 3) for key, values in numbers.items()},
        "low": round(ratio.low, 3),
        "high": round(ratio.high, 3),
        "peak_mib": max(numbers["peak_mib"]),
    }


def table(path: Path, shapes: dict[str, Shape], processors: Literal["all", "one"]) -> Measured:
    """Seconds of the thread for the table of a model, its candidates, and the process's peak memory in MiB."""
    if processors == "one":  # joblib then works in this thread
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    found, methods = _layers(path, shapes), closed_forms()
    with tempfile.TemporaryDirectory() as folder:
        cache = FactorizationCache(Settings().memory_limit, Path(folder))
        start = time.thread_time()
        rows = tabulate(found, methods, lambda _: Grid.of_machine(BLOCK), cache, _silent)
        seconds = time.thread_time() - start
    count = sum(len(row.options) for row in rows if row.factorable)
    return seconds, count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def bare(path: Path, shapes: dict[str, Shape]) -> Measured:
    """Seconds of the thread for the SVDs, their number, and the process's peak memory in MiB."""
    seconds, count = 0.0, 0
    with threadpool_limits(1):
        for layer in _layers(path, shapes):
            for matrix in unfoldings(layer, closed_forms()):
                stack = np.ascontiguousarray(matrix, np.float32)
                start = time.thread_time()
                np.linalg.svd(stack, full_matrices=False)
                seconds += time.thread_time() - start
                count += 1
    return seconds, count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def closed_forms() -> list[Decomposition]:
    """The formats of the table."""
    return [method for name, method in all_decompositions().items() if name not in ITERATIVE]


def unfoldings(layer: Layer, methods: Sequence[Decomposition]) -> list[Array]:
    """Every unfolding of the weight that these formats cut, once, as a stack of matrices."""
    weight, found = layer.read(), dict[tuple[int, ...], Array]()
    for method in methods:
        if method.refusal(layer.shape) is None:
            found |= dict(_cut(method, layer, weight))
    return list(found.values())


def _cut(method: Decomposition, layer: Layer, weight: Array) -> Iterator[tuple[tuple[int, ...], Array]]:
    """What one format cuts, each with a key of its own."""
    groups, out, in_, *kernel = weight.shape
    axes = tuple(range(len(kernel)))
    if isinstance(method, TwoStage):
        yield _halves(weight, method.first_axes(tuple(kernel)))
    elif method.name in {"tucker2", "tensor_train"}:
        yield from (_halves(weight, first) for first in (axes, ()))
    elif method.name == "grouped_svd":
        for count in (k for k in range(2, in_ + 1) if in_ % k == 0):
            slices = weight.reshape(groups, out, count, -1).swapaxes(1, 2)
            yield (-1, count), slices.reshape(groups * count, out, -1)
    elif method.name == "kronecker":
        for mine in dict.fromkeys(rank[:-1] for rank in method.ranks(layer.shape, BLOCK)):
            pairs = [(part, whole // part) for whole, part in zip(weight.shape[1:], mine, strict=True)]
            split = weight[0].reshape([size for pair in pairs for size in pair])
            rows = split.transpose([*range(0, split.ndim, 2), *range(1, split.ndim, 2)])
            yield (-2, *mine), rows.reshape(1, math.prod(mine), -1)


def _halves(weight: Array, first: Shape) -> tuple[tuple[int, ...], Array]:
    """Outputs and the kernel's other axes by inputs and its `first` axes."""
    rest = [axis for axis in range(weight.ndim - 3) if axis not in first]
    order = (0, 1, *(3 + axis for axis in rest), 2, *(3 + axis for axis in first))
    rows = weight.shape[1] * math.prod(weight.shape[3 + axis] for axis in rest)
    return (-3, *first), weight.transpose(order).reshape(len(weight), rows, -1)


def _silent(_done: int, _total: int) -> None:
    """Nobody waits for the progress of a benchmark."""


def _layers(path: Path, shapes: dict[str, Shape]) -> list[Layer]:
    graph = io.load(path)
    return layers(graph, shapes_as_trace(graph, inferred_shapes(graph, shapes)))[0]


def _size(text: str) -> tuple[str, Shape]:
    name, _, sizes = text.partition("=")
    return name, tuple(int(size) for size in sizes.partition("*")[0].split("x"))


def _alone(work: Callable[..., Measured], *given: object) -> Measured:
    """Run in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *given).result()


if __name__ == "__main__":
    sys.exit(main())
