"""The comparison as a table of contents: one candidate table, asked for layers and for whole networks."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from onnx_lowrank.accuracy import evaluate_original
from onnx_lowrank.calibration.walk import CannotCutError
from onnx_lowrank.catalogue import all_decompositions, split
from onnx_lowrank.comparison.layers import compared_layers
from onnx_lowrank.comparison.model import Budget, Comparison
from onnx_lowrank.comparison.networks import Field, compared_networks, file_name, teams_of
from onnx_lowrank.goals import Goal, KeepMacs, Speedup
from onnx_lowrank.graph import io
from onnx_lowrank.graph.size import parameters
from onnx_lowrank.latency.chains import ChainTimer
from onnx_lowrank.latency.environment import environment
from onnx_lowrank.latency.grid import channel_block
from onnx_lowrank.latency.table import LatencyTable
from onnx_lowrank.output import check_paths
from onnx_lowrank.plan import PassSpec
from onnx_lowrank.progress import Phases
from onnx_lowrank.providers import require_provider
from onnx_lowrank.search.analysis import without_samples
from onnx_lowrank.search.calibrated import CalibratedTable
from onnx_lowrank.search.factorizations import FactorizationCache
from onnx_lowrank.search.matched import MatchedGrid, worth_pricing, worth_pricing_next
from onnx_lowrank.search.prepare import Prepared, prepare, tuned_for
from onnx_lowrank.search.pricing import decomposed, grids
from onnx_lowrank.search.source import Source, source_of
from onnx_lowrank.search.table import Row, price
from onnx_lowrank.settings import Settings

# Candidates of a format timed one after the other to come near a budget of speed, once its marks are.
APPROACHES = 3
DEFAULT_BUDGETS: tuple[Goal, ...] = (KeepMacs(0.5), Speedup(2))


def compare(
    model: Path | str,
    goals: Sequence[Goal] = DEFAULT_BUDGETS,
    settings: Settings | None = None,
    phases: Phases | None = None,
    *,
    models: Path | None = None,
    beside: Collection[Path] = (),
) -> Comparison:
    """Every format beside the others, layer by layer and for the whole network, at the same budgets.

    Args:
        model: The model; never changed.
        goals: The budgets: goals of size (KeepMacs, KeepParams) or of speed (Speedup).
        settings: Target, data and everything else; its goal does not count. Where `passes` names no decomposition, all
            there are take part.
        phases: Timed and shown.
        models: An existing folder that keeps the network of every row; None keeps none.
        beside: Other files the caller will write.

    Raises:
        InputError: for input that cannot be used, or a file to write that is one.
    """
    model = Path(model)
    settings, phases = settings or Settings(), phases or Phases()
    settings = replace(settings, passes=_with_decompositions(settings.passes))
    kept = () if models is None else tuple(models / name for name in _files(goals, settings.passes))
    written = (*beside, *kept)
    for path in (*written, *map(io.data_of, kept)):
        check_paths(path, model, settings.calibration, settings.eval)
    require_provider(settings.target)
    with phases.phase("read"):
        source = source_of(model, settings)
        for path in written:
            io.spare_sources(source.graph, path)
    deadline = math.inf if settings.time_limit is None else time.monotonic() + settings.time_limit
    settings = tuned_for(source, settings, phases)
    params = parameters(source.graph)
    with tempfile.TemporaryDirectory(prefix="onnx-lowrank-") as name, LatencyTable() as memory:
        folder = Path(name)
        ready = prepare(source, settings, folder, phases)
        with phases.phase("evaluate"):
            labelled = None if ready.racer.as_float32 else source.labelled
            scores = None if labelled is None else evaluate_original(model, labelled, settings.metric, settings.target)
        cache = FactorizationCache(settings.memory_limit, folder)
        source, ready, rows, table = _table(source, ready, settings, goals, cache, phases, memory)
        timer = ChainTimer(settings.target, memory, ready.normalized.level)
        with phases.phase("time chains") as advance:
            wanted = {option for row in rows for option in worth_pricing(row, goals)}
            for _ in range(1 + APPROACHES):
                rows = price(rows, timer, advance, wanted.__contains__) if wanted else rows
                wanted = {option for row in rows for option in worth_pricing_next(row, goals)}
        layers = compared_layers(rows, goals, timer, table, phases)
        with phases.phase("baseline"):
            baseline = ready.racer.race([ready.original, ready.normalized])
        field = Field(source, ready, cache, rows, timer, table, scores, settings, folder, deadline, baseline)
        networks = compared_networks(field, goals, models, phases)
    told = () if source.held_out is None else source.held_out.notes
    notes = (*ready.notes, *told, *(() if table is None else table.calibration.samples.notes))
    return Comparison(
        model=str(model),
        target=asdict(settings.target),
        budgets=tuple(map(Budget.of, goals)),
        params=params,
        macs=ready.survey.macs,
        layers=layers,
        networks=networks,
        data=_data(source, table),
        timings={name: round(seconds, 3) for name, seconds in phases.seconds.items()},
        environment={**environment(settings.target), "measured_on_cores": list(ready.racer.cores)},
        notes=tuple(dict.fromkeys(notes)),
    )


def _with_decompositions(specs: tuple[PassSpec, ...]) -> tuple[PassSpec, ...]:
    """The passes, and all decompositions where none is among them."""
    return specs if split(specs)[1] else (*specs, *map(PassSpec, all_decompositions()))


def _files(goals: Sequence[Goal], specs: tuple[PassSpec, ...]) -> Iterator[str]:
    """The networks of all rows."""
    teams = teams_of([method.name for method in split(specs)[1]])
    return (file_name(goal, team) for goal in goals for team in teams)


def _table(
    source: Source,
    ready: Prepared,
    settings: Settings,
    goals: Sequence[Goal],
    cache: FactorizationCache,
    phases: Phases,
    memory: LatencyTable,
) -> tuple[Source, Prepared, list[Row], CalibratedTable | None]:
    """Every layer in every format near the budgets, calibrated where that can be done."""
    with phases.phase("channel grid"):
        near = partial(MatchedGrid.near, goals)
        grid_of = grids(ready.survey, partial(channel_block, settings.target, memory), near)
    try:
        return source, ready, *decomposed(source, ready, settings, cache, phases, memory, grid_of)
    except CannotCutError as error:
        source, ready = without_samples(source, ready, error)
        return source, ready, *decomposed(source, ready, settings, cache, phases, memory, grid_of)


def _data(source: Source, table: CalibratedTable | None) -> str:
    """What errors are measured on, in words."""
    held_out = "synthetic inputs" if source.held_out is None else f"{len(source.held_out)} held-out samples"
    fitted = "data-free" if table is None else f"calibrated on {len(table.calibration.samples)} samples"
    return f"{fitted}; errors of networks on {held_out}"
