"""Model files timed against each other in turns, and where each one's time goes, node by node.

Latency comes from the wall clock. onnxruntime's profiler slows a model down, so it only says how the time is shared
out. Its node names are those of the optimized graph; they are led back to the user's names as far as they tell.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto
from rich.console import Console
from rich.table import Table

from onnx_lowrank.attribution import NodeTime, attribute, name_nodes
from onnx_lowrank.errors import InputError
from onnx_lowrank.latency.measure import Interval, Paired, paired
from onnx_lowrank.runtime import Session, open_session
from onnx_lowrank.signature import Feeds, index_bounds
from onnx_lowrank.synthetic import resolve_shapes, synthetic_feeds
from onnx_lowrank.target import Target

_PROFILED_RUNS = 5
_IN_MEMORY_BYTES = 1 << 30


@dataclass(frozen=True)
class ModelProfile:
    """One file at its best optimization level.

    Args:
        path: The file.
        level: Graph optimization level that was fastest.
        load_s: Seconds from file to session.
        size_bytes: The file and the external data it names.
        p50_ms: Median latency of one run.
        p95_ms: 95th percentile.
        ratio: Latency of the first file / latency of this one; above 1 is faster.
        ratio_ci95: Bootstrap interval of it.
        nodes: Largest share first.
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


@dataclass(frozen=True)
class Profile:
    """Several files timed in turns.

    Args:
        models: In the order given.
        provider: Execution provider.
        threads: Intra-op threads.
        rounds: Times every file was run.
        disturbed: The machine was too busy to trust the ratios.
        synthetic: The inputs were made up; `notes` says which dimensions were.
        notes: Sentences.
    """

    models: tuple[ModelProfile, ...]
    provider: str
    threads: int
    rounds: int
    disturbed: bool
    synthetic: bool
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return dataclasses.asdict(self)


def profile(models: Sequence[Path], target: Target, feeds: Feeds | None = None, budget_s: float = 20.0) -> Profile:
    """Time model files with the same inputs against each other; the first is what the others are compared with.

    Args:
        models: At least one file.
        target: Where to run; each file runs at the best of its levels.
        feeds: One sample; None: inputs drawn to fit the signature.
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
    opened = [_open_best(path, target, feeds) for path in models]
    result = paired([o.session for o in opened], [o.feeds for o in opened], budget_s=budget_s)
    profiles = (_model_profile(o, result, index, target) for index, o in enumerate(opened))
    notes = tuple(dict.fromkeys(note for o in opened for note in o.notes))
    return Profile(
        tuple(profiles), target.provider, target.threads, result.rounds, result.disturbed, feeds is None, notes
    )


def render(result: Profile, console: Console, nodes: int = 10) -> None:
    """Print the comparison, and the `nodes` most expensive nodes of every file."""
    table = Table(title=f"{result.provider}, {result.threads} thread(s), {result.rounds} rounds in turns")
    table.add_column("model")
    for heading in ("level", "p50 ms", "p95 ms", "faster than first", "load s", "MB"):
        table.add_column(heading, justify="right")
    for model in result.models:
        low, high = model.ratio_ci95
        ratio = f"{model.ratio:.2f}x [{low:.2f}, {high:.2f}]"
        numbers = (f"{model.p50_ms:.3f}", f"{model.p95_ms:.3f}", ratio, f"{model.load_s:.2f}")
        table.add_row(Path(model.path).name, model.level, *numbers, f"{model.size_bytes / 1e6:.2f}")
    console.print(table)
    for model in result.models:
        shares = Table(title=f"where the time goes: {Path(model.path).name}")
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


@dataclass(frozen=True, eq=False)
class _Opened:
    path: Path
    session: Session
    level: str
    load_s: float
    feeds: Feeds
    notes: list[str]


def _open_best(path: Path, target: Target, feeds: Feeds | None) -> _Opened:
    candidates: list[_Opened] = []
    for level in target.levels:
        start = time.perf_counter()
        session = open_session(path, target, level)
        load_s = time.perf_counter() - start
        drawn, notes = (feeds, []) if feeds is not None else _synthetic(path, session, target)
        candidates.append(_Opened(path, session, level, load_s, drawn, notes))
    if len(candidates) == 1:
        return candidates[0]
    result = paired([c.session for c in candidates], [c.feeds for c in candidates], rounds=5, budget_s=1.0)
    return candidates[int(np.argmax(result.ratios))]


def _synthetic(path: Path, session: Session, target: Target) -> tuple[Feeds, list[str]]:
    inputs = session.signature.inputs
    shapes, notes = resolve_shapes(inputs, target.shapes[0].shapes if target.shapes else {})
    return synthetic_feeds(inputs, shapes, 0, index_bounds(onnx.load(path, load_external_data=False))), notes


def _model_profile(opened: _Opened, result: Paired, index: int, target: Target) -> ModelProfile:
    samples = result.timings[index].samples_ms
    model = onnx.load(opened.path, load_external_data=False)
    return ModelProfile(
        path=str(opened.path),
        level=opened.level,
        load_s=opened.load_s,
        size_bytes=_size_bytes(opened.path, model),
        p50_ms=result.timings[index].median_ms,
        p95_ms=float(np.quantile(samples, 0.95)),
        ratio=result.ratios[index],
        ratio_ci95=result.ci95[index],
        nodes=_node_times(opened, model, target),
    )


def _node_times(opened: _Opened, model: ModelProto, target: Target) -> tuple[NodeTime, ...]:
    source: Path | bytes = opened.path
    if _size_bytes(opened.path, model) == opened.path.stat().st_size < _IN_MEMORY_BYTES:
        name_nodes(model.graph)  # the profile says nothing about nodes without a name
        source = model.SerializeToString()
    with tempfile.TemporaryDirectory(prefix="onnx-lowrank-") as folder:
        session = open_session(source, target, opened.level, profile_to=Path(folder))
        for _ in range(_PROFILED_RUNS + 1):
            session.run(opened.feeds)
        events = session.profile_events()
    # The first run also allocates.
    return attribute(events[len(events) // (_PROFILED_RUNS + 1) :], model.graph)


def _size_bytes(path: Path, model: ModelProto) -> int:
    files = {
        path.parent / entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return sum(file.stat().st_size for file in {path, *files})
