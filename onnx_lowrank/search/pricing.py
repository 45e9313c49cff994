"""The candidate table of a prepared model, from data where there are any, and priced on the target."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from onnx_lowrank.allocators import SPECTRAL, Allocator
from onnx_lowrank.calibration.affordable import usable
from onnx_lowrank.calibration.samples import Samples
from onnx_lowrank.candidates import Cost, Grid
from onnx_lowrank.goals import KeepMacs, KeepParams
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.graph.size import parameters
from onnx_lowrank.latency.chains import ChainTimer, Pricer
from onnx_lowrank.latency.grid import KINDS, Kind, channel_block
from onnx_lowrank.latency.table import LatencyTable
from onnx_lowrank.layer import Layer, LayerShape
from onnx_lowrank.progress import Phases
from onnx_lowrank.runtime import versions
from onnx_lowrank.search.calibrated import PROBE_VERSION, CalibratedTable, Calibration
from onnx_lowrank.search.device import Device
from onnx_lowrank.search.factorizations import FactorizationCache
from onnx_lowrank.search.prediction import NEIGHBOUR, size_problem
from onnx_lowrank.search.prepare import Prepared
from onnx_lowrank.search.rules import rule_for
from onnx_lowrank.search.source import Source
from onnx_lowrank.search.survey import Survey
from onnx_lowrank.search.table import GridOf, Row, price, tabulate
from onnx_lowrank.settings import Settings

logger = logging.getLogger(__name__)
FULL_RANK = "full_rank"
SizesOf = Callable[[Sequence[Row]], tuple[float, float]]


def candidates(
    source: Source,
    ready: Prepared,
    settings: Settings,
    cache: FactorizationCache,
    phases: Phases,
    there: Device | None = None,
    deadline: float = math.inf,
) -> tuple[list[Row], Pricer, CalibratedTable | None, Allocator]:
    """Decompose, calibrate where there are samples, and time every candidate the goal could choose.

    With `there` no candidate is timed: prices are those of that device. A rule that measures ends at `deadline`.

    Returns:
        The table; what priced it; what was learnt from samples, None without; and the rank rule.
    """
    found = ready.survey
    table = LatencyTable()
    by_size = isinstance(settings.goal, KeepMacs | KeepParams)
    with phases.phase("channel grid"):
        block_of = there.block if there else partial(channel_block, settings.target, table)
        of_size = partial(Grid.of_size, cost="params" if isinstance(settings.goal, KeepParams) else "macs")
        grid_of = grids(found, block_of, of_size if by_size else lambda _, block: Grid.of_machine(block))
    rows, calibrated = decomposed(source, ready, settings, cache, phases, table, grid_of)
    level = ready.normalized.level
    rule = rule_for(settings, rows, calibrated, deadline)
    timer = there.pricer(level) if there else ChainTimer(settings.target, table, level)
    if by_size:
        sizes_of = partial(totals, settings, found, graph=source.graph)
        rows = priced_by_size(rows, settings, rule, timer, sizes_of, phases)
    else:
        with phases.phase("time chains") as advance:
            rows = price(rows, timer, advance)
    return rows, timer, calibrated, rule


def priced_by_size(
    rows: Sequence[Row], settings: Settings, rule: Allocator, timer: Pricer, sizes_of: SizesOf, phases: Phases
) -> list[Row]:
    """The table with latencies of what a goal of size chooses, and of its neighbour: time plays no part in it.

    What was chosen and cannot be timed is not left in a model: its format is taken from the layer, and the rule is
    asked again.

    Args:
        rows: The table.
        settings: With a goal of size.
        rule: The rank rule.
        timer: Prices chains.
        sizes_of: Says of a table what `totals` says.
        phases: Timed and shown.
    """
    while True:
        with phases.phase("search"):
            problems = [size_problem(rows, settings.goal, *sizes_of(rows), times) for times in (1.0, NEIGHBOUR)]
            wanted = {o.name for problem in problems for o in rule(problem)}
        with phases.phase("time chains") as advance:
            timed = price(rows, timer, advance, lambda o, wanted=wanted: o.name in wanted)
        failed = wanted - {o.name for row in timed for o in row.options}
        if not failed:
            return timed
        gone = {(key, method) for key, method, _ in failed}
        rows = [_without(row, gone) if now.factorable else now for row, now in zip(rows, timed, strict=True)]


def _without(row: Row, gone: Collection[tuple[str, str]]) -> Row:
    """A row without these formats of these layers."""
    return replace(row, options=tuple(o for o in row.options if (o.key, o.method) not in gone))


def decomposed(
    source: Source,
    ready: Prepared,
    settings: Settings,
    cache: FactorizationCache,
    phases: Phases,
    memory: LatencyTable,
    grid_of: GridOf,
) -> tuple[list[Row], CalibratedTable | None]:
    """The table without prices, calibrated where there are samples; `memory` keeps what is probed."""
    found, exact, spectral = ready.survey, settings.allocator == FULL_RANK, settings.allocator in SPECTRAL
    if source.samples is None or exact or ready.racer.as_float32:
        with phases.phase("decompose") as advance:
            methods = tuple(ready.methods.values())
            rows = tabulate(found.layers, methods, grid_of, cache, advance, exact_only=exact, spectral=spectral)
            return rows, None
    given = _calibration(source, ready, settings, source.samples, cache.folder, memory)
    calibrated = CalibratedTable(source.graph, found.layers, ready.methods, grid_of, cache, given, phases, spectral)
    return calibrated.rows(), calibrated


def kind_of(layer: Layer) -> Kind:
    """Which of the channel blocks the layer's chains are cut to."""
    return "conv" if layer.form.op == "Conv" else "matmul"


def grids(found: Survey, block_of: Callable[[Kind], int], made: Callable[[LayerShape, int], Grid]) -> GridOf:
    """Ranks worth a look, from the channel blocks of the target, probed for the operators there are."""
    kinds = {kind_of(layer) for layer in found.layers}
    blocks = {kind: block_of(kind) for kind in KINDS if kind in kinds}

    def grid_of(layer: Layer) -> Grid:
        return made(layer.shape, blocks[kind_of(layer)])

    return grid_of


def _calibration(
    source: Source, ready: Prepared, settings: Settings, samples: Samples, folder: Path, memory: LatencyTable
) -> Calibration:
    """Samples and conditions; networks run on all cores, in exact arithmetic."""
    methods = [(name, method.options) for name, method in ready.methods.items()]
    passes = [(record.name, record.options) for record in ready.records]
    target = settings.target.for_samples()
    samples = usable(samples, source.path, source.graph, target, folder)
    data = (samples.fit.sha256, samples.judge.sha256)
    seen = [PROBE_VERSION, source.sha256, data, methods, passes, versions()]
    return Calibration(samples, target, folder, memory, json.dumps(seen, default=str))


def totals(
    settings: Settings, found: Survey, rows: Sequence[Row], graph: Graph, among: Sequence[Row] | None = None
) -> tuple[float, float]:
    """For goals of size: what the goal is a share of, and what of it the factorable layers hold.

    Args:
        settings: The goal, and whether it is a share of all.
        found: The model.
        rows: The table.
        graph: Of the model.
        among: The table whose factorable layers the goal is a share of, where `rows` holds fewer methods.
    """
    match settings.goal:
        case KeepMacs():
            inside, whole = _held(rows, "macs"), found.macs
        case KeepParams():
            inside, whole = _held(rows, "params"), parameters(graph)
        case _:
            return 0.0, 0.0
    if settings.of == "factorable":
        whole = _held(rows if among is None else among, "params" if isinstance(settings.goal, KeepParams) else "macs")
    return whole, inside


def _held(rows: Sequence[Row], cost: Cost) -> float:
    """What the factorable layers hold."""
    return sum(row.keep.cost(cost) for row in rows if row.factorable)
