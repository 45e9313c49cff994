"""From a file to the answer of the search: the road every command takes that has to know what a model could become."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from onnx_lowrank.allocators import ALLOCATORS
from onnx_lowrank.candidates import Candidate
from onnx_lowrank.catalogue import all_decompositions, split
from onnx_lowrank.data import Dataset, read_npz
from onnx_lowrank.decomposition import Decomposition
from onnx_lowrank.errors import InputError
from onnx_lowrank.goals import KeepMacs, KeepParams
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
from onnx_lowrank.plan import Choice, PassSpec, Plan
from onnx_lowrank.progress import Phases
from onnx_lowrank.runtime import versions
from onnx_lowrank.search.bench import Bench
from onnx_lowrank.search.factorizations import FactorizationCache
from onnx_lowrank.search.loop import Loop, Outcome
from onnx_lowrank.search.prediction import Prediction
from onnx_lowrank.search.racer import Contestant, Racer
from onnx_lowrank.search.survey import Survey, make_samples, normalize, runs_natively, survey
from onnx_lowrank.search.table import Row, price, tabulate
from onnx_lowrank.search.tuning import tuned
from onnx_lowrank.settings import Settings
from onnx_lowrank.signature import Signature, signature_of
from onnx_lowrank.validation import compare

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
        selection: The half of them a search may choose by.
        held_out: The other half, which only reports use.
        labelled: Labelled samples, or None.
    """

    path: Path
    graph: Graph
    sha256: str
    signature: Signature
    data: Dataset | None
    selection: Dataset | None
    held_out: Dataset | None
    labelled: Dataset | None


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


def read_source(path: Path, calibration: Path | None = None, labelled: Path | None = None) -> Source:
    """Read a model and the data that go with it.

    Raises:
        InputError: if a file cannot be used; the model is looked at first.
    """
    graph = io.load(path)
    signature = signature_of(graph.to_proto())
    data = None if calibration is None else read_npz(calibration, signature.inputs)
    labels = None if labelled is None else read_npz(labelled, signature.inputs)
    if labels is not None and labels.labels is None:
        raise InputError(f"{labelled} without an array 'label'", "labelled samples", "add labels, or leave --eval out")
    selection, held_out = (
        (None, None) if data is None else (data, data) if len(data) < 2 else data.split(0.5, SPLIT_SEED)
    )
    return Source(path, graph, io.model_sha256(path), signature, data, selection, held_out, labels)


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
    rows, timer = _candidates(ready, settings, cache, phases)
    bench = Bench(source.graph, ready.methods, cache, ready.racer, folder, deadline)

    def plan_of(chosen: Sequence[Candidate]) -> Plan:
        return _plan(source, ready.records, ready.methods, found, chosen)

    def error_of(model: Path) -> float:
        return compare(source.path, model, settings.target, source.selection, seed=settings.seed).relative_error

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
    ready: Prepared, settings: Settings, cache: FactorizationCache, phases: Phases
) -> tuple[list[Row], ChainTimer]:
    found = ready.survey
    table = LatencyTable()
    with phases.phase("channel grid"):
        ops = {layer.form.op for layer in found.layers}
        kinds: list[Kind] = [*(["conv"] if "Conv" in ops else []), *(["matmul"] if ops - {"Conv"} else [])]
        blocks: dict[str, int] = {kind: channel_block(settings.target, table, kind) for kind in kinds}
    exact = settings.allocator == FULL_RANK
    with phases.phase("decompose") as advance:
        rows = tabulate(found.layers, tuple(ready.methods.values()), blocks, cache, advance, exact_only=exact)
    timer = ChainTimer(settings.target, table, ready.normalized.level)
    with phases.phase("time chains") as advance:
        rows = price(rows, timer, advance)
    return rows, timer


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


def _plan(
    source: Source,
    records: Sequence[PassRecord],
    methods: Mapping[str, Decomposition],
    found: Survey,
    chosen: Sequence[Candidate],
) -> Plan:
    nodes = {layer.key: layer.nodes[0] for layer in found.layers}
    choices = tuple(Choice(c.key, nodes[c.key], c.method, c.rank, c.error, c.ms) for c in chosen)
    graph_passes = [PassSpec(record.name, record.options) for record in records]
    used = {c.method for c in chosen}
    optional = [PassSpec(m.name, asdict(m)) for m in methods.values() if m.name in used and asdict(m)]  # pyright: ignore[reportArgumentType] - decompositions are dataclasses
    return Plan(
        source.sha256, choices, (*graph_passes, *optional), source.data.sha256 if source.data else None, versions()
    )
