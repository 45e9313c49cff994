"""The candidate table of a prepared model, from data where there are any, and priced on the target."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from onnx_lowrank.allocators import ALLOCATORS
from onnx_lowrank.calibration.samples import Samples, batched_for
from onnx_lowrank.candidates import Grid
from onnx_lowrank.goals import KeepMacs, KeepParams
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.graph.size import parameters
from onnx_lowrank.latency.chains import ChainTimer
from onnx_lowrank.latency.grid import Kind, channel_block
from onnx_lowrank.latency.table import LatencyTable
from onnx_lowrank.layer import Layer
from onnx_lowrank.progress import Phases
from onnx_lowrank.runtime import versions
from onnx_lowrank.search.calibrated import PROBE_VERSION, CalibratedTable, Calibration
from onnx_lowrank.search.factorizations import FactorizationCache
from onnx_lowrank.search.prediction import NEIGHBOUR, size_problem
from onnx_lowrank.search.prepare import Prepared
from onnx_lowrank.search.source import Source
from onnx_lowrank.search.survey import Survey
from onnx_lowrank.search.table import GridOf, Row, price, tabulate
from onnx_lowrank.settings import Settings
from onnx_lowrank.target import Target

logger = logging.getLogger(__name__)
FULL_RANK = "full_rank"


def candidates(
    source: Source, ready: Prepared, settings: Settings, cache: FactorizationCache, phases: Phases
) -> tuple[list[Row], ChainTimer, CalibratedTable | None]:
    """Decompose, calibrate where there are samples, and time every candidate the goal could choose.

    Returns:
        The table; what timed it; and what was learnt from samples, None without.
    """
    found = ready.survey
    table = LatencyTable()
    by_size = isinstance(settings.goal, KeepMacs | KeepParams)
    with phases.phase("channel grid"):
        grid_of = _grid(found, settings.target, table, by_size=by_size)
    exact = settings.allocator == FULL_RANK
    calibrated = None
    if source.samples is None or exact or ready.racer.as_float32:
        with phases.phase("decompose") as advance:
            rows = tabulate(found.layers, tuple(ready.methods.values()), grid_of, cache, advance, exact_only=exact)
    else:
        given = _calibration(source, ready, settings, source.samples, cache.folder, table)
        calibrated = CalibratedTable(source.graph, found.layers, ready.methods, grid_of, cache, given, phases)
        rows = calibrated.rows()
    timer = ChainTimer(settings.target, table, ready.normalized.level)
    with phases.phase("time chains") as advance:
        wanted = _of_size(rows, settings, found, source.graph) if by_size else None
        rows = price(rows, timer, advance, lambda o: wanted is None or (o.key, o.method, o.rank) in wanted)
    return rows, timer, calibrated


def _grid(found: Survey, target: Target, table: LatencyTable, *, by_size: bool) -> GridOf:
    """Ranks worth a look, from the channel blocks of the target, probed for the operators there are."""
    ops = {layer.form.op for layer in found.layers}
    kinds: list[Kind] = [*(["conv"] if "Conv" in ops else []), *(["matmul"] if ops - {"Conv"} else [])]
    blocks: dict[str, int] = {kind: channel_block(target, table, kind) for kind in kinds}

    def grid_of(layer: Layer) -> Grid:
        block = blocks["conv" if layer.form.op == "Conv" else "matmul"]
        return Grid.of_size(layer.shape, block) if by_size else Grid.of_machine(block)

    return grid_of


def _of_size(
    rows: Sequence[Row], settings: Settings, found: Survey, graph: Graph
) -> set[tuple[str, str, tuple[int, ...]]]:
    """What a goal of size chooses, and its neighbour: time plays no part in it, so nothing else is timed."""
    sizes = totals(settings, found, rows, graph)
    problems = [size_problem(rows, settings.goal, *sizes, times) for times in (1.0, NEIGHBOUR)]
    return {(o.key, o.method, o.rank) for problem in problems for o in ALLOCATORS[settings.allocator](problem)}


def _calibration(
    source: Source, ready: Prepared, settings: Settings, samples: Samples, folder: Path, memory: LatencyTable
) -> Calibration:
    """Samples and conditions; networks run on all cores, in exact arithmetic."""
    methods = [(name, asdict(method)) for name, method in ready.methods.items()]  # pyright: ignore[reportArgumentType] - decompositions are dataclasses
    passes = [(record.name, record.options) for record in ready.records]
    data = (samples.fit.sha256, samples.judge.sha256)
    seen = [PROBE_VERSION, source.sha256, data, methods, passes, versions()]
    target = replace(settings.target, threads=0).exact()
    samples = batched_for(samples, source.path, target)
    return Calibration(samples, target, folder, memory, json.dumps(seen, default=str))


def totals(settings: Settings, found: Survey, rows: Sequence[Row], graph: Graph) -> tuple[float, float]:
    """For goals of size: what the goal is a share of, and what of it the factorable layers hold."""
    factorable = [row.layer for row in rows if row.factorable]
    match settings.goal:
        case KeepMacs():
            inside, whole = sum(layer.macs for layer in factorable), found.macs
        case KeepParams():
            inside, whole = sum(layer.shape.params for layer in factorable), parameters(graph)
        case _:
            return 0.0, 0.0
    return (inside if settings.of == "factorable" else whole), inside
