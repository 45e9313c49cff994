"""Model files timed against each other in turns, and where each one's time goes, node by node.

onnxruntime's profiler slows a model down, so it only says how the time is shared out; latency comes from the clock that
other processes disturb least. Node names in its profile are those of the optimized graph; they are led back to the
user's names as far as they tell.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from rich.console import Console
from rich.table import Table

from onnx_lowrank.attribution import NodeTime, attribute, name_nodes
from onnx_lowrank.errors import InputError
from onnx_lowrank.graph.size import file_bytes
from onnx_lowrank.latency.measure import Interval, Paired
from onnx_lowrank.latency.race import Weighted, race
from onnx_lowrank.layer import Shape
from onnx_lowrank.placement import Placement
from onnx_lowrank.runtime import open_session
from onnx_lowrank.signature import Feeds, index_bounds, signature_of
from onnx_lowrank.synthetic import resolve_shapes, synthetic_feeds
from onnx_lowrank.target import Target

_PROFILED_RUNS = 5
_IN_MEMORY_BYTES = 1 << 30
_LEVEL_S = 1.0


@dataclass(frozen=True)
class ModelProfile:
    """One file at its best optimization level, on inputs of one set of shapes.

    Args:
        path: The file.
        level: Graph optimization level that was fastest, over all sets of shapes.
        load_s: Seconds from file to session.
        size_bytes: The file and the external data it names.
        p50_ms: Median latency of one run.
        p95_ms: 95th percentile.
        ratio: Latency of the first file / latency of this one, on the same inputs; above 1 is faster.
        ratio_ci95: Bootstrap interval of it.
        nodes: Largest share first.
        shapes: Of the inputs, by name.
        placement: Which provider runs which operators, most nodes first; empty where onnxruntime cannot tell.
    """

    path: str
    level: str
    load_s: float
    size_bytes: int
    p50_ms: float
    p95_ms: float
    ratio: float
    ratio_ci95: Interval
    nodes: tuple[NodeTime, ...]
    shapes: Mapping[str, Shape]
    placement: tuple[Placement, ...] = ()


@dataclass(frozen=True)
class Profile:
    """Several files timed in turns.

    Args:
        models: All files, in the order given, on the first set of shapes, then on the next.
        provider: Execution provider.
        threads: Intra-op threads.
        rounds: Times every file was run, at least.
        disturbed: The machine was too busy to trust the ratios.
        synthetic: The inputs were made up; `notes` says which dimensions were.
        notes: Sentences.
        clock: What was read, "cpu" or "wall"; see `measure.Clock`.
    """

    models: tuple[ModelProfile, ...]
    provider: str
    threads: int
    rounds: int
    disturbed: bool
    synthetic: bool
    notes: tuple[str, ...] = ()
    clock: str = "wall"

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return dataclasses.asdict(self)


def profile(models: Sequence[Path], target: Target, feeds: Feeds | None = None, budget_s: float = 20.0) -> Profile:
    """Time model files with the same inputs against each other; the first is what the others are compared with.

    Args:
        models: At least one file.
        target: Where to run, and on which sets of shapes; each file runs at the best of its levels.
        feeds: One sample; None: inputs drawn to fit the first file's signature, one for each set of shapes.
        budget_s: Wall clock of the timing in turns.

    Raises:
        InputError: if a file cannot be loaded, or does not take the inputs.
        ProviderError: if the provider cannot run them.
    """
    if not models:
        raise InputError("no model", "at least one ONNX file", "name one")
    for path in models:
        if not path.is_file():
            raise InputError(f"{path}, which does not exist", "an ONNX file", "check the path")
    samples, notes = ([(feeds, 1.0)], ()) if feeds is not None else _drawn(models[0], target)
    opened = [_at_best(path, target, samples) for path in models]
    entries = [(entry.path, entry.level) for entry in opened]
    races = [race(entries, target, [(sample, 1.0)], budget_s / len(samples)) for sample, _ in samples]
    profiles = [
        _model_profile(entry, sample, result, index, target)
        for (sample, _), result in zip(samples, races, strict=True)
        for index, entry in enumerate(opened)
    ]
    return Profile(
        tuple(profiles),
        target.provider,
        target.threads,
        min(result.rounds for result in races),
        any(result.disturbed for result in races),
        feeds is None,
        notes,
        races[0].clock.value,
    )


def render(result: Profile, console: Console, nodes: int = 10) -> None:
    """Print the comparison, and the `nodes` most expensive nodes of every file."""
    title = f"{result.provider}, {result.threads} thread(s), {result.rounds} rounds in turns, {result.clock} clock"
    table = Table(title=title)
    table.add_column("model")
    several = len({_sizes(model) for model in result.models}) > 1
    if several:
        table.add_column("inputs", overflow="fold")
    for heading in ("level", "p50 ms", "p95 ms", "faster than first", "load s", "MB"):
        table.add_column(heading, justify="right")
    for model in result.models:
        low, high = model.ratio_ci95
        ratio = f"{model.ratio:.2f}x [{low:.2f}, {high:.2f}]"
        numbers = (f"{model.p50_ms:.3f}", f"{model.p95_ms:.3f}", ratio, f"{model.load_s:.2f}")
        sizes = (_sizes(model),) if several else ()
        table.add_row(Path(model.path).name, *sizes, model.level, *numbers, f"{model.size_bytes / 1e6:.2f}")
    console.print(table)
    if result.provider != "cpu":
        console.print(_placement_table(result))
    for model in result.models:
        where = f" at {_sizes(model)}" if several else ""
        shares = Table(title=f"where the time goes: {Path(model.path).name}{where}")
        shares.add_column("node")
        shares.add_column("ran as")
        shares.add_column("share", justify="right")
        for entry in model.nodes[:nodes]:
            shares.add_row(entry.node, ", ".join(entry.ops), f"{entry.share:.1%}")
        console.print(shares)
    for note in result.notes:
        console.print(note)
    if result.synthetic:
        console.print("Inputs are synthetic: drawn to fit the signature.")
    if result.disturbed:
        console.print("The machine was busy: the ratios scatter or drift. Time again on a quieter one.")


def _placement_table(result: Profile) -> Table:
    table = Table(title="where it runs")
    for heading in ("model", "provider", "nodes", "operators"):
        table.add_column(heading, justify="right" if heading == "nodes" else "left", overflow="fold")
    for path, rows in {model.path: model.placement for model in result.models}.items():
        for row in rows:
            listed = ", ".join(f"{count} {op}" for op, count in row.operators.items())
            table.add_row(Path(path).name, row.provider, str(row.nodes), listed)
        if not rows:
            table.add_row(Path(path).name, "unknown: onnxruntime before 1.24 does not tell", "", "")
    return table


def _sizes(model: ModelProfile) -> str:
    return " ".join(f"{name}={'x'.join(map(str, shape)) or 'scalar'}" for name, shape in model.shapes.items())


@dataclass(frozen=True)
class _Opened:
    """A file that was opened, at the level it runs fastest at."""

    path: Path
    level: str
    load_s: float
    placement: tuple[Placement, ...]


def _drawn(path: Path, target: Target) -> tuple[Sequence[Weighted], tuple[str, ...]]:
    """One sample per set of shapes, weighted, and notes on what had to be guessed."""
    model = onnx.load(path, load_external_data=False)
    inputs, bounds = signature_of(model).inputs, index_bounds(model)
    resolved = [(resolve_shapes(inputs, entry.shapes), entry.weight) for entry in target.shapes]
    resolved = resolved or [(resolve_shapes(inputs, {}), 1.0)]
    samples = [(synthetic_feeds(inputs, shapes, 0, bounds), weight) for (shapes, _), weight in resolved]
    return samples, tuple(dict.fromkeys(note for (_, notes), _ in resolved for note in notes))


def _at_best(path: Path, target: Target, samples: Sequence[Weighted]) -> _Opened:
    level = target.levels[0]
    if len(target.levels) > 1:
        ratios = race([(path, each) for each in target.levels], target, samples, _LEVEL_S).ratios
        level = target.levels[int(np.argmax(ratios))]
    start = time.perf_counter()
    session = open_session(path, target, level)
    return _Opened(path, level, time.perf_counter() - start, session.placement())


def _model_profile(opened: _Opened, feeds: Feeds, result: Paired, index: int, target: Target) -> ModelProfile:
    timing = result.timings[index]
    return ModelProfile(
        path=str(opened.path),
        level=opened.level,
        load_s=opened.load_s,
        size_bytes=file_bytes(opened.path),
        p50_ms=timing.median_ms,
        p95_ms=float(np.quantile(timing.samples_ms, 0.95)),
        ratio=result.ratios[index],
        ratio_ci95=result.ci95[index],
        nodes=_node_times(opened, feeds, target),
        shapes={name: array.shape for name, array in feeds.items()},
        placement=opened.placement,
    )


def _node_times(opened: _Opened, feeds: Feeds, target: Target) -> tuple[NodeTime, ...]:
    model = onnx.load(opened.path, load_external_data=False)
    source: Path | bytes = opened.path
    if file_bytes(opened.path) == opened.path.stat().st_size < _IN_MEMORY_BYTES:
        name_nodes(model.graph)  # the profile says nothing about nodes without a name
        source = model.SerializeToString()
    with tempfile.TemporaryDirectory(prefix="onnx-lowrank-") as folder:
        session = open_session(source, target, opened.level, profile_to=Path(folder))
        for _ in range(_PROFILED_RUNS + 1):
            session.run(feeds)
        events = session.profile_events()
    # The first run also allocates.
    return attribute(events[len(events) // (_PROFILED_RUNS + 1) :], model.graph)
