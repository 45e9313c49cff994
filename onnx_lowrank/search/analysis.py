"""From a file to the answer of the search: the road every command takes that has to know what a model could become."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from onnx_lowrank.accuracy import evaluate, evaluate_original
from onnx_lowrank.allocators import SEARCHING, SLICING, Allocator
from onnx_lowrank.allocators.interfaces import slices
from onnx_lowrank.calibration.walk import CannotCutError
from onnx_lowrank.candidates import Candidate, loss_of
from onnx_lowrank.errors import InputError, NonFiniteResultError
from onnx_lowrank.goals import Goal, KeepMacs, KeepParams, MaxDrop
from onnx_lowrank.latency.chains import Pricer
from onnx_lowrank.latency.measure import Paired
from onnx_lowrank.plan import CALIBRATED, DATA_FREE, MEMORY_LIMIT, REFIT, Choice, PassSpec, Plan
from onnx_lowrank.progress import Phases
from onnx_lowrank.runtime import versions
from onnx_lowrank.search.attempt import Attempt, Outcome
from onnx_lowrank.search.bench import Bench
from onnx_lowrank.search.calibrated import CalibratedTable
from onnx_lowrank.search.device import Device
from onnx_lowrank.search.elsewhere import remember_models
from onnx_lowrank.search.factorizations import FactorizationCache
from onnx_lowrank.search.foresight import Foresight
from onnx_lowrank.search.loop import Loop
from onnx_lowrank.search.prediction import Prediction
from onnx_lowrank.search.prepare import Prepared, prepare
from onnx_lowrank.search.pricing import candidates, totals
from onnx_lowrank.search.source import Source
from onnx_lowrank.search.straight import Straight
from onnx_lowrank.search.table import Row
from onnx_lowrank.settings import Settings
from onnx_lowrank.validation import compare

logger = logging.getLogger(__name__)
DRIFT_S = 6.0
REPORT_SEED = 1000  # added to the seed of synthetic inputs that figures are reported on


@dataclass(frozen=True, eq=False)
class Ground:
    """What is known before a goal is pursued.

    Args:
        source: The user's model and data.
        ready: Its layers and how to time it.
        cache: Factorizations made so far.
        rows: The candidate table, priced as far as the goal needs it.
        timer: Prices chains.
        table: What was learnt from samples; None without.
        allocator: The rank rule.
        among: The table whose factorable layers a goal of size may be a share of; None: `rows`.
        baseline: The original and the normalized model in turns, where they were timed already.
    """

    source: Source
    ready: Prepared
    cache: FactorizationCache
    rows: Sequence[Row]
    timer: Pricer
    table: CalibratedTable | None
    allocator: Allocator
    among: Sequence[Row] | None = None
    baseline: Paired | None = None

    def totals(self, settings: Settings) -> tuple[float, float]:
        """For goals of size: what the goal is a share of, and what of it the factorable layers hold."""
        return totals(settings, self.ready.survey, self.rows, self.source.graph, self.among)


@dataclass(frozen=True, eq=False)
class Analysis:
    """What the search found.

    Args:
        source: The user's model and data.
        ready: Its layers and how to time it.
        rows: The candidate table.
        bench: Realises plans.
        timer: Counts the chains that were timed and dropped.
        outcome: The best choice.
        loop: What found it.
    """

    source: Source
    ready: Prepared
    rows: Sequence[Row]
    bench: Bench
    timer: Pricer
    outcome: Outcome
    loop: Loop

    def nearer(self, goal: Goal, speedup: float, low_rank_speedup: float, standing: float) -> Analysis | None:
        """What the search finds when it goes on, its model being finished and slower than a goal of speed wants.

        Args:
            goal: The goal.
            speedup: Of the finished model over the original.
            low_rank_speedup: Of it over the normalized model.
            standing: How much of the goal it reaches.

        Returns:
            The search with a faster model; None where it had not reached the goal itself, has no time, or finds none.

        Raises:
            MeasuringError: if the model found cannot be timed.
        """
        if not self.outcome.reached or self.bench.late:
            return None
        with self.bench.phases.phase("search"):
            found = self.loop.nearer(goal, self.outcome.best, low_rank_speedup, standing)
        if found is None:
            return None
        note = f"the first model found was {speedup:.3f}x as fast when it was finished: a faster one was looked for"
        return replace(self, outcome=found, ready=replace(self.ready, notes=(*self.ready.notes, note)))

    def keeping_all(self, reason: str, *, reached: bool) -> Analysis:
        """The same with the original as it is, for when the best model found must not be written."""
        best, chosen = self.outcome.best, tuple(row.keep for row in self.rows if row.factorable)
        plan = replace(_plan(self.source, self.ready, chosen, DATA_FREE, self.timer.source), passes=())
        path, record = self.bench.realise(plan)
        dense_ms = best.predicted_ms / best.predicted_share
        kept = Attempt(chosen, plan, path, record, predicted_ms=dense_ms, predicted_share=1.0)
        return replace(self, outcome=Outcome(kept, reached, reason))


def analyse(source: Source, settings: Settings, folder: Path, phases: Phases, there: Device | None = None) -> Analysis:
    """Find the best model for the goal.

    Args:
        source: The model and its data.
        settings: Options.
        folder: For trial models.
        phases: Timed and shown.
        there: Plan for this device, by what is known of it; nothing is timed then.

    Raises:
        LowRankError: as its parts do.
    """
    drop = _drop_of(source, settings) if isinstance(settings.goal, MaxDrop) else None
    deadline = math.inf if settings.time_limit is None else time.monotonic() + settings.time_limit
    ready = prepare(source, settings, folder, phases, there)
    cache = FactorizationCache(settings.memory_limit, folder)
    try:
        rows, timer, table, allocator = candidates(source, ready, settings, cache, phases, there, deadline)
    except CannotCutError as error:
        source, ready = without_samples(source, ready, error)
        cache = FactorizationCache(settings.memory_limit, folder)
        rows, timer, table, allocator = candidates(source, ready, settings, cache, phases, there, deadline)
    ready = replace(ready, notes=(*ready.notes, *_unsliced(settings.allocator, rows)))
    ground = Ground(source, ready, cache, rows, timer, table, allocator)
    return pursue(ground, settings, folder, phases, deadline, there=there, drop=drop)


def _unsliced(rule: str, rows: Sequence[Row]) -> Iterator[str]:
    """What there is to say of a rule that chooses numbers of slices where there is nothing to choose."""
    chains = (option.chain for row in rows for option in row.options)
    if rule in SLICING and not any(slices(chain) > 1 for chain in chains if chain is not None):
        yield f"{rule} had no format of several slices to choose from: name one, as in --passes svd,grouped_svd"


def without_samples(source: Source, ready: Prepared, error: CannotCutError) -> tuple[Source, Prepared]:
    """What a model that cannot be walked through has to do with."""
    note = f"no calibration: {error} would have to be carried along"
    return replace(source, samples=None), replace(ready, notes=(*ready.notes, note))


def pursue(
    ground: Ground,
    settings: Settings,
    folder: Path,
    phases: Phases,
    deadline: float = math.inf,
    *,
    there: Device | None = None,
    drop: Callable[[Path], float] | None = None,
    foretell: bool = True,
) -> Analysis:
    """Choose from a table, realise, time, and choose again.

    Args:
        ground: The table and what it was made from.
        settings: Options.
        folder: For trial models.
        phases: Timed and shown.
        deadline: `time.monotonic()` at which searching should end.
        there: The device that counts instead of this machine.
        drop: How much the task metric of a model falls, for a goal that limits it.
        foretell: Foretell the latency of what a goal of size chooses, too, by timing a model much like it.
    """
    source, ready, timer, table = ground.source, ground.ready, ground.timer, ground.table
    # Never by samples that are reported on: too few to divide are only reported on.
    judge = None if source.samples is None else source.samples.judge
    bench = Bench(source.path, source.graph, ready.methods, ground.cache, ready.racer, folder, deadline, table, phases)
    fit = DATA_FREE if table is None else REFIT if settings.refit else CALIBRATED

    def plan_of(chosen: Sequence[Candidate]) -> Plan:
        return replace(_plan(source, ready, chosen, fit, timer.source), planned_for=there.label if there else "")

    def error_of(model: Path) -> float:
        if drop is not None:
            return drop(model)
        metric = settings.error_metric
        found = compare(source.path, model, settings.target, judge, seed=settings.seed, error_metric=metric)
        broken = any(output.non_finite_new for output in found.outputs)
        return math.inf if broken else found.error(metric)

    with phases.phase("search"):
        # In turns with the original, as the finished model will be timed; a race of one would end after a moment.
        baseline = ground.baseline or ready.racer.race([ready.original, ready.normalized])
        normalized_ms, by_size = baseline.timings[1].median_ms, isinstance(settings.goal, KeepMacs | KeepParams)
        prediction = Prediction(ground.rows, normalized_ms)
        foretold = foretell or not by_size
        if foretold:
            prediction = _prediction(ground.rows, normalized_ms, ready, timer)
        if there is None and foretold:  # else how far the machine has drifted since the chains were timed is unknown
            both = [(ready.original, f"original {source.path.name}"), (ready.normalized, "normalized")]
            remember_models(ready.racer, both, baseline, prediction.drift)
        damage = table.measure if table is not None and settings.allocator in SEARCHING else loss_of
        found = (bench, prediction, baseline, ground.allocator, ready.original, ready.normalized)
        parts = (*found, plan_of, error_of, damage, settings.allocator == "knapsack")
        loop = (
            Foresight(*parts, planned_for=there.label, source=timer.source)
            if there
            else (Loop if foretell else Straight)(*parts)
        )
        outcome = loop.run(settings.goal, *ground.totals(settings))
    return Analysis(source, ready, ground.rows, bench, timer, outcome, loop)


def _prediction(rows: Sequence[Row], normalized_ms: float, ready: Prepared, timer: Pricer) -> Prediction:
    """The priced table, on the scale of the normalized model's latency as it is now."""
    priced = [row.layer for row in rows if row.factorable and row.keep.ms]
    model = ready.racer.subject(ready.normalized)
    if not priced or model is None:
        return Prediction(rows, normalized_ms)
    drift = timer.drift(priced, model, normalized_ms, min(DRIFT_S, ready.racer.seconds))
    logger.info("layers take %.3f times what the latency table says", drift)
    return Prediction(rows, normalized_ms, drift)


def _plan(source: Source, ready: Prepared, chosen: Sequence[Candidate], fit: str, known: str) -> Plan:
    nodes = {layer.key: layer.nodes[0] for layer in ready.survey.layers}
    choices = tuple(
        Choice(c.key, nodes[c.key], c.method, c.rank, c.error, c.ms, None if c.ms is None else known) for c in chosen
    )
    graph_passes = [PassSpec(record.name, record.options) for record in ready.records]
    used = {c.method for c in chosen}
    methods = ready.methods.values()
    optional = [PassSpec(m.name, m.options) for m in methods if m.name in used and m.options]
    data = source.data.sha256 if source.data else None
    limit = MEMORY_LIMIT if source.samples is None else source.samples.memory_limit
    passes = (*graph_passes, *optional)
    return Plan(source.sha256, choices, passes, data, versions(), fit, memory_limit=limit)


def _drop_of(source: Source, settings: Settings) -> Callable[[Path], float]:
    """How much the task metric of a model falls on the labelled samples a search may choose by; infinite if broken.

    Raises:
        InputError: if the metric does not fit the original, or its outputs cannot be scored.
    """
    given = source.choosing
    assert given is not None  # noqa: S101 - the goal demands labelled samples
    before = float(evaluate_original(source.path, given, settings.metric, settings.target).mean())

    def drop(model: Path) -> float:
        try:
            return before - float(evaluate(model, given, settings.metric, settings.target).mean())
        except (InputError, NonFiniteResultError) as error:
            logger.warning("%s is not looked at any further: %s", model.name, error)
            return math.inf

    return drop
