"""From a file to the answer of the search: the road every command takes that has to know what a model could become."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from onnx_lowrank.accuracy import evaluate
from onnx_lowrank.allocators import ALLOCATORS
from onnx_lowrank.calibration.samples import Samples, divided
from onnx_lowrank.candidates import Candidate, Grid
from onnx_lowrank.catalogue import all_decompositions, split
from onnx_lowrank.data import Dataset, read_samples
from onnx_lowrank.decomposition import Decomposition
from onnx_lowrank.errors import InputError
from onnx_lowrank.goals import KeepMacs, KeepParams, MaxDrop
from onnx_lowrank.graph import io
from onnx_lowrank.graph.keys import keyed_nodes
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.graph.size import parameters
from onnx_lowrank.latency.chains import ChainTimer
from onnx_lowrank.latency.grid import Kind, channel_block
from onnx_lowrank.latency.table import LatencyTable
from onnx_lowrank.layer import Kept, Layer
from onnx_lowrank.pass_manager import PassRecord
from onnx_lowrank.passes.normalize import DEFAULT_NORMALIZE, MEASURED_NORMALIZE
from onnx_lowrank.plan import CALIBRATED, DATA_FREE, REFIT, Choice, PassSpec, Plan
from onnx_lowrank.progress import Phases
from onnx_lowrank.runtime import versions
from onnx_lowrank.search.bench import Bench
from onnx_lowrank.search.calibrated import PROBE_VERSION, CalibratedTable, Calibration
from onnx_lowrank.search.factorizations import FactorizationCache
from onnx_lowrank.search.loop import Attempt, Loop, Outcome
from onnx_lowrank.search.prediction import Prediction, size_problem
from onnx_lowrank.search.racer import Contestant, Racer
from onnx_lowrank.search.survey import Survey, make_samples, normalize, runs_natively, survey
from onnx_lowrank.search.table import GridOf, Row, price, tabulate
from onnx_lowrank.search.tuning import tuned
from onnx_lowrank.settings import Settings
from onnx_lowrank.signature import Signature, signature_of
from onnx_lowrank.target import Target
from onnx_lowrank.validation import compare

logger = logging.getLogger(__name__)
FULL_RANK = "full_rank"
SPLIT_SEED = 0
REPORT_SEED = 1000  # added to the seed of synthetic inputs that figures are reported on


@dataclass(frozen=True, eq=False)
class Source:
    """The user's model and data, read and checked.

    Args:
        path: The file.
        graph: Its content; normalizing edits it.
        sha256: Of the file and its external data.
        signature: Inputs and outputs.
        data: Unlabelled samples, or None.
        samples: Those to calibrate with and to choose by; None without data, or where they are too few.
        held_out: The others, which only reports use.
        labelled: Labelled samples, or None.
    """

    path: Path
    graph: Graph
    sha256: str
    signature: Signature
    data: Dataset | None
    samples: Samples | None
    held_out: Dataset | None
    labelled: Dataset | None

    @cached_property
    def choosing(self) -> Dataset | None:
        """The half of the labelled samples that a search for a drop of the metric may choose by."""
        return None if self.labelled is None else self.labelled.split(0.5, SPLIT_SEED)[0]

    @cached_property
    def reporting(self) -> Dataset | None:
        """The other half, on which such a search is reported."""
        return None if self.labelled is None else self.labelled.split(0.5, SPLIT_SEED)[1]


@dataclass(frozen=True, eq=False)
class Prepared:
    """A model normalized and surveyed, ready to be priced.

    Args:
        survey: Layers and kept nodes of the normalized model.
        records: What the graph passes did.
        methods: Allowed decompositions by name.
        racer: Times models on the target's samples.
        original: The user's file at its best level.
        normalized: The normalized file at its best level.
        notes: What the user should know.
    """

    survey: Survey
    records: Sequence[PassRecord]
    methods: dict[str, Decomposition]
    racer: Racer
    original: Contestant
    normalized: Contestant
    notes: tuple[str, ...]


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
    """

    source: Source
    ready: Prepared
    rows: Sequence[Row]
    bench: Bench
    timer: ChainTimer
    outcome: Outcome

    def keeping_all(self, reason: str, *, reached: bool) -> Analysis:
        """The same with every layer kept, for when the best model found must not be written."""
        best, chosen = self.outcome.best, tuple(row.keep for row in self.rows if row.factorable)
        plan = _plan(self.source, self.ready, chosen, best.plan.fit)
        path, record = self.bench.realise(plan)
        dense_ms = best.predicted_ms / best.predicted_share
        kept = Attempt(chosen, plan, path, record, predicted_ms=dense_ms, predicted_share=1.0)
        return replace(self, outcome=Outcome(kept, reached, reason))


def read_source(
    path: Path,
    calibration: Path | str | None = None,
    labelled: Path | str | None = None,
    *,
    preprocess: str | None = None,
    limit: int | None = None,
) -> Source:
    """Read a model and the data that go with it.

    Args:
        path: The model.
        calibration: Unlabelled samples, see `data.read_samples`.
        labelled: Labelled samples.
        preprocess: How images become arrays.
        limit: How many of `calibration` to use at most.

    Raises:
        InputError: if a file cannot be used; the model is looked at first.
    """
    graph = io.load(path)
    signature = signature_of(graph.to_proto())
    inputs = signature.inputs
    data = None if calibration is None else read_samples(calibration, inputs, preprocess=preprocess, limit=limit)
    labels = None if labelled is None else read_samples(labelled, inputs, preprocess=preprocess)
    if labels is not None and labels.labels is None:
        raise InputError(f"{labelled} without an array 'label'", "labelled samples", "add labels, or leave --eval out")
    samples, held_out = None, data
    if data is not None:
        try:
            samples, held_out = divided(data, SPLIT_SEED)
        except InputError as error:
            logger.warning("no calibration: %s", error)
    return Source(path, graph, io.model_sha256(path), signature, data, samples, held_out, labels)


def tuned_for(source: Source, settings: Settings, phases: Phases) -> Settings:
    """Settings completed with the provider options the source runs fastest with."""
    if settings.target.variants() == (settings.target,):
        return settings
    samples, _ = make_samples(source.graph, settings.target, source.data, settings.seed)
    return tuned(source.path, samples, settings, phases)


def prepare(source: Source, settings: Settings, folder: Path, phases: Phases) -> Prepared:
    """Normalize the source's graph, in place, and find its layers.

    Raises:
        LowRankError: if the model does not run on the target, a pass fails, or a weight is not finite.
    """
    passes, methods = split(settings.passes)
    with phases.phase("baseline"):
        samples, notes = make_samples(source.graph, settings.target, source.data, settings.seed)
        native, remarks = runs_natively(source.path, settings.target)
        racer = Racer(settings.target, samples, folder, as_float32=not native)
        # A search of a second must not spend eight on one race.
        racer.seconds = min(racer.seconds, settings.time_limit or racer.seconds)
        original = racer.best_level(source.path)
    with phases.phase("normalize"):
        path = folder / "normalized.onnx"
        records = normalize(
            source.graph, passes or DEFAULT_NORMALIZE, () if passes else MEASURED_NORMALIZE, racer, path
        )
        normalized = racer.best_level(path)
        found = _pinned(survey(source.graph, racer, folder), settings)
    if not native:
        notes = (*notes, f"{settings.target.provider_name} has no kernels for its element types: timed as float32")
    notes = (*notes, *remarks)
    allowed = {method.name: method for method in methods} or all_decompositions()
    return Prepared(found, records, allowed, racer, original, normalized, notes)


def analyse(source: Source, settings: Settings, folder: Path, phases: Phases) -> Analysis:
    """Find the best model for the goal.

    Args:
        source: The model and its data.
        settings: Options.
        folder: For trial models.
        phases: Timed and shown.

    Raises:
        LowRankError: as its parts do.
    """
    deadline = math.inf if settings.time_limit is None else time.monotonic() + settings.time_limit
    ready = prepare(source, settings, folder, phases)
    found = ready.survey
    cache = FactorizationCache(settings.memory_limit, folder)
    rows, timer, table = _candidates(source, ready, settings, cache, phases)
    bench = Bench(source.graph, ready.methods, cache, ready.racer, folder, deadline, table, phases)
    fit = DATA_FREE if table is None else REFIT if settings.refit else CALIBRATED

    def plan_of(chosen: Sequence[Candidate]) -> Plan:
        return _plan(source, ready, chosen, fit)

    def error_of(model: Path) -> float:
        if isinstance(settings.goal, MaxDrop):
            return _drop(source, model, settings)
        given = None if source.samples is None else source.samples.judge
        metric, data = settings.error_metric, given or source.data
        found = compare(source.path, model, settings.target, data, seed=settings.seed, error_metric=metric)
        return found.error(metric)

    with phases.phase("search"):
        baseline = ready.racer.race([ready.normalized]).timings[0].median_ms
        allocator = ALLOCATORS[settings.allocator]
        loop = Loop(bench, Prediction(rows, baseline), allocator, ready.original, ready.normalized, plan_of, error_of)
        outcome = loop.run(settings.goal, *_totals(settings, found, rows, source.graph))
    return Analysis(source, ready, rows, bench, timer, outcome)


def _pinned(found: Survey, settings: Settings) -> Survey:
    """The survey with the layers the user pinned among the kept ones."""
    names = {key: node.name or key for _, node, key in keyed_nodes(found.graph)}
    known = {name for key in (*(n for layer in found.layers for n in layer.nodes), *(k.key for k in found.kept))
             for name in (key, names[key])}  # fmt: skip
    settings.require_matches(known)
    free: list[Layer] = []
    kept = list(found.kept)
    for layer in found.layers:
        reason = settings.pinned(*layer.nodes, *(names[node] for node in layer.nodes))
        if reason is None:
            free.append(layer)
            continue
        kept.extend(
            Kept(
                node,
                names[node],
                layer.form.op,
                reason,
                str(layer.shape),
                layer.shape.params,
                layer.macs / len(layer.nodes),
            )
            for node in layer.nodes
        )
    return replace(found, layers=tuple(free), kept=tuple(kept))


def _candidates(
    source: Source, ready: Prepared, settings: Settings, cache: FactorizationCache, phases: Phases
) -> tuple[list[Row], ChainTimer, CalibratedTable | None]:
    found = ready.survey
    table = LatencyTable()
    by_size = isinstance(settings.goal, KeepMacs | KeepParams)
    with phases.phase("channel grid"):
        grid_of = _size_grid if by_size else _machine_grid(found, settings.target, table)
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


def _size_grid(layer: Layer) -> Grid:
    return Grid.of_size(layer.shape)


def _machine_grid(found: Survey, target: Target, table: LatencyTable) -> GridOf:
    """Ranks that fill the channel blocks of the target, probed for the operators there are."""
    ops = {layer.form.op for layer in found.layers}
    kinds: list[Kind] = [*(["conv"] if "Conv" in ops else []), *(["matmul"] if ops - {"Conv"} else [])]
    blocks: dict[str, int] = {kind: channel_block(target, table, kind) for kind in kinds}
    return lambda layer: Grid.of_machine(blocks["conv" if layer.form.op == "Conv" else "matmul"])


def _of_size(
    rows: Sequence[Row], settings: Settings, found: Survey, graph: Graph
) -> set[tuple[str, str, tuple[int, ...]]]:
    """What a goal of size chooses: time plays no part in it, so nothing else is timed."""
    problem = size_problem(rows, settings.goal, *_totals(settings, found, rows, graph))
    return {(o.key, o.method, o.rank) for o in ALLOCATORS[settings.allocator](problem)}


def _calibration(
    source: Source, ready: Prepared, settings: Settings, samples: Samples, folder: Path, memory: LatencyTable
) -> Calibration:
    """Samples and conditions; networks run on all cores, in exact arithmetic."""
    methods = [(name, asdict(method)) for name, method in ready.methods.items()]  # pyright: ignore[reportArgumentType] - decompositions are dataclasses
    passes = [(record.name, record.options) for record in ready.records]
    data = (samples.fit.sha256, samples.judge.sha256)
    seen = [PROBE_VERSION, source.sha256, data, methods, passes, versions()]
    target = replace(settings.target, threads=0).exact()
    return Calibration(samples, target, folder, memory, json.dumps(seen, default=str))


def _totals(settings: Settings, found: Survey, rows: Sequence[Row], graph: Graph) -> tuple[float, float]:
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


def _plan(source: Source, ready: Prepared, chosen: Sequence[Candidate], fit: str) -> Plan:
    nodes = {layer.key: layer.nodes[0] for layer in ready.survey.layers}
    choices = tuple(Choice(c.key, nodes[c.key], c.method, c.rank, c.error, c.ms) for c in chosen)
    graph_passes = [PassSpec(record.name, record.options) for record in ready.records]
    used = {c.method for c in chosen}
    methods = ready.methods.values()
    optional = [PassSpec(m.name, asdict(m)) for m in methods if m.name in used and asdict(m)]  # pyright: ignore[reportArgumentType] - decompositions are dataclasses
    data = source.data.sha256 if source.data else None
    return Plan(source.sha256, choices, (*graph_passes, *optional), data, versions(), fit)


def _drop(source: Source, model: Path, settings: Settings) -> float:
    """How much the task metric falls on the labelled samples a search may choose by."""
    given = source.choosing
    assert given is not None  # noqa: S101 - the goal demands labelled samples
    before, after = (evaluate(path, given, settings.metric, settings.target) for path in (source.path, model))
    return float(before.mean() - after.mean())
