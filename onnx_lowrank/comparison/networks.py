"""Whole networks: the same model within the same budget by one format alone, by the default ones, and by all."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from onnx_lowrank.catalogue import default_decompositions
from onnx_lowrank.comparison.model import Budget, NetworkComparison, on_front
from onnx_lowrank.decomposition import Rank
from onnx_lowrank.errors import InvalidResultError, LowRankError
from onnx_lowrank.goals import Goal, Speedup
from onnx_lowrank.latency.chains import ChainTimer
from onnx_lowrank.latency.child import MeasuringError
from onnx_lowrank.latency.measure import Paired
from onnx_lowrank.metrics import Scores
from onnx_lowrank.output import publish
from onnx_lowrank.progress import Phases
from onnx_lowrank.report.assemble import assemble
from onnx_lowrank.report.model import Report
from onnx_lowrank.search.analysis import Ground, pursue
from onnx_lowrank.search.calibrated import CalibratedTable
from onnx_lowrank.search.factorizations import FactorizationCache
from onnx_lowrank.search.matched import cost_of, of_formats
from onnx_lowrank.search.prediction import size_problem
from onnx_lowrank.search.prepare import Prepared
from onnx_lowrank.search.pricing import priced_by_size
from onnx_lowrank.search.rules import rule_for
from onnx_lowrank.search.source import Source
from onnx_lowrank.search.table import Row
from onnx_lowrank.settings import Settings

UNITS = {"macs": "MACs", "params": "parameters"}
Choice = tuple[tuple[str, str, Rank], ...]
AS_IT_IS = (0.0, 1.0)  # error and latency of the original, as a share of its own


@dataclass(frozen=True, eq=False)
class Field:
    """What all rows have in common.

    Args:
        source: The user's model and data.
        ready: Its layers and how to time it.
        cache: Factorizations made so far.
        rows: The table of all formats.
        timer: Prices chains.
        table: What was learnt from samples; None without.
        scores: The original's task metric, sample by sample; None without labelled samples.
        settings: Options.
        folder: For trial models.
        deadline: `time.monotonic()` after which no further network is tried.
        baseline: The original and the normalized model in turns.
    """

    source: Source
    ready: Prepared
    cache: FactorizationCache
    rows: Sequence[Row]
    timer: ChainTimer
    table: CalibratedTable | None
    scores: Scores | None
    settings: Settings
    folder: Path
    deadline: float
    baseline: Paired

    def ground(self, formats: Sequence[str], goal: Goal) -> Ground:
        """The table with these formats alone."""
        rows = of_formats(self.rows, formats, timed=isinstance(goal, Speedup))
        rule = rule_for(self.settings, rows, self.table, self.deadline)
        return Ground(self.source, self.ready, self.cache, rows, self.timer, self.table, rule, self.rows, self.baseline)


def compared_networks(
    field: Field, goals: Sequence[Goal], models: Path | None, phases: Phases
) -> tuple[NetworkComparison, ...]:
    """Compare formats by the networks they give.

    Args:
        field: What all rows have in common.
        goals: The budgets.
        models: Keeps the networks; None keeps none.
        phases: Timed and shown.
    """
    teams = teams_of(tuple(field.ready.methods))
    found: list[NetworkComparison] = []
    with phases.phase("networks") as advance:
        for goal in goals:
            built: dict[Choice, NetworkComparison] = {}
            for name, formats in teams.items():
                started = time.perf_counter()
                row = NetworkComparison(str(Budget.of(goal)), name, formats, reached=False, reason="")
                row = _network(row, field, goal, built, models, phases)
                found.append(replace(row, seconds=round(time.perf_counter() - started, 2)))
                advance(len(found), len(goals) * len(teams))
    return tuple(_with_fronts(found))


def file_name(goal: Goal, team: str) -> str:
    """Of the network of a row."""
    return f"{goal.kind}-{goal.value:g}_{team}.onnx"


def teams_of(formats: Sequence[str]) -> Mapping[str, tuple[str, ...]]:
    """Name -> formats that are allowed together: each alone, the default ones among them, and all."""
    default = tuple(name for name in formats if name in default_decompositions())
    several = {"default": default, "all": tuple(formats)}
    teams: dict[str, tuple[str, ...]] = {name: (name,) for name in formats}
    for name, team in several.items():
        if len(team) > 1 and team not in teams.values():
            teams[name] = team
    return teams


def _network(
    row: NetworkComparison,
    field: Field,
    goal: Goal,
    built: dict[Choice, NetworkComparison],
    models: Path | None,
    phases: Phases,
) -> NetworkComparison:
    """The row with what was found out; `built` are those before it whose choice was known before they were built."""
    if time.monotonic() > field.deadline:
        return replace(row, reason="not tried: --time-limit is over")
    settings, ground = replace(field.settings, goal=goal), field.ground(row.formats, goal)
    if not any(layer.factorable for layer in ground.rows):
        return replace(row, reason="it takes no layer")
    if isinstance(goal, Speedup):
        return _measured(row, ground, settings, field, models, phases)
    sizes = ground.totals(settings)
    problem = size_problem(ground.rows, goal, *sizes)
    if not problem.fits(problem.cheapest()):
        least = (problem.total(problem.cheapest()) + sizes[0] - sizes[1]) / sizes[0]
        return replace(row, reason=f"not reached: at least {least:.3f} of the {UNITS[cost_of(goal)]} remain")
    choice = tuple(c.name for c in ground.allocator(problem) if c.chain is not None)
    if choice in built:
        return replace(built[choice], name=row.name, formats=row.formats, same_as=built[choice].name)
    priced = priced_by_size(
        ground.rows,
        settings,
        ground.allocator,
        ground.timer,
        lambda rows: replace(ground, rows=rows).totals(settings),
        phases,
    )
    built[choice] = _measured(row, replace(ground, rows=priced), settings, field, models, phases)
    return built[choice]


def _measured(
    row: NetworkComparison, ground: Ground, settings: Settings, field: Field, models: Path | None, phases: Phases
) -> NetworkComparison:
    """The row with the figures of its network, which is realised, refitted, timed and compared."""
    with tempfile.TemporaryDirectory(prefix="network-", dir=field.folder) as room:
        path = Path(room) / file_name(settings.goal, row.name)
        try:
            analysis = pursue(ground, settings, Path(room), phases, field.deadline, foretell=False)
            report = assemble(analysis, settings, path, phases, field.scores)
        except LowRankError as error:
            return replace(row, reason=_failure(error))
        if models is not None:
            publish(path, models / path.name)
    row = _told(row, report)
    return row if models is None else replace(row, file=str(models / path.name))


def _failure(error: LowRankError) -> str:
    """Why a row has no network: one that a provider dies of must not cost the others."""
    if isinstance(error, InvalidResultError):
        return error.got
    return f"its network failed: {error.reason if isinstance(error, MeasuringError) else error.got}"


def _told(row: NetworkComparison, report: Report) -> NetworkComparison:
    time_, error = report.latency, report.fidelity["relative_error"]
    assert time_ is not None  # noqa: S101 - what is assembled on this machine was timed
    changed = [layer.method for layer in report.layers if layer.decision == "factorized"]
    return replace(
        row,
        reached=report.goal.reached,
        reason=report.goal.reason,
        used=dict(Counter(changed)),
        relative_error=error,
        accuracy=report.accuracy,
        params=report.size.params_after,
        macs=report.size.macs_after,
        ms=time_.after_ms,
        speedup=time_.speedup,
        ci95=time_.ci95,
        low_rank_speedup=time_.low_rank_speedup,
        low_rank_ci95=time_.low_rank_ci95,
        disturbed=time_.disturbed,
    )


def _with_fronts(rows: Sequence[NetworkComparison]) -> Iterator[NetworkComparison]:
    """Marked, all budgets together."""
    points = [None if r.relative_error is None or not r.speedup else (r.relative_error, 1 / r.speedup) for r in rows]
    fronts = on_front([AS_IT_IS, *points])[1:]
    return (replace(row, front=front) for row, front in zip(rows, fronts, strict=True))
