"""Model files timed against each other in turns, and where each one's time goes, node by node.

onnxruntime's profiler slows a model down, so it only says how the time is shared out; latency comes from the clock that
other processes disturb least. Node names in its profile are those of the optimized graph; they are led back to the
user's names as far as they tell.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx

from onnx_lowrank.errors import InputError
from onnx_lowrank.graph import io
from onnx_lowrank.graph.size import file_bytes
from onnx_lowrank.kernel_trace import KernelEvent
from onnx_lowrank.latency.environment import environment
from onnx_lowrank.latency.measure import Clock, Paired
from onnx_lowrank.latency.race import Weighted, common_clock, race
from onnx_lowrank.placement import Placement
from onnx_lowrank.profile.attribution import attribute, by_layer, by_operator, changes, name_nodes
from onnx_lowrank.profile.inputs import Inputs, drawn
from onnx_lowrank.profile.memory import HOW, MemoryMeter
from onnx_lowrank.profile.model import Comparison, ModelProfile, Profile
from onnx_lowrank.profile.sweep import Configuration, Sweep, left_open
from onnx_lowrank.progress import Phases
from onnx_lowrank.runtime import open_session
from onnx_lowrank.signature import Feeds
from onnx_lowrank.target import Target

_PROFILED_RUNS = (5, 50)
_PROFILED_MS = 500.0
_IN_MEMORY_BYTES = 1 << 30
_LEVEL_S = 1.0
_ENOUGH_RUNS = 200  # two of them lie beyond the 99th percentile
_FEWEST_RUNS = 20  # one of them lies beyond the 95th percentile
_WIDE = 0.03


def profile(
    models: Sequence[Path],
    target: Target,
    feeds: Feeds | None = None,
    budget_s: float = 20.0,
    sweep: Sweep | None = None,
    phases: Phases | None = None,
) -> Profile:
    """Time model files with the same inputs against each other; the first is what the others are compared with.

    Args:
        models: At least one file.
        target: Where to run, and on which sets of shapes; each file runs at the best of its levels.
        feeds: One sample; None: inputs drawn to fit the first file's signature, one for each set of shapes.
        budget_s: Wall clock of the timing in turns, for each combination of the sweep.
        sweep: Threads, batches and levels to combine; None: one combination, as `target` says.
        phases: Told how far it is.

    Raises:
        InputError: if a file cannot be loaded, or does not take the inputs.
        ProviderError: if the provider cannot run them.
    """
    sweep = sweep or Sweep()
    if not models:
        raise InputError("no model", "at least one ONNX file", "name one")
    for path in models:
        io.load(path)  # refuses what is no valid model, with a sentence
    if feeds is not None and sweep.batches:
        raise InputError("sizes of batches beside a sample", "one of the two", "leave one out")
    configurations = sweep.configurations(target)
    given = {
        entry.batch: drawn(models, target, entry.batch) if feeds is None else Inputs([(feeds, 1.0)])
        for entry in configurations
    }
    if len(configurations) > 1:
        _require_runs(models, target, [feeds for inputs in given.values() for feeds, _ in inputs.samples])
    clock = common_clock(models, [entry.target for entry in configurations])
    rows: list[ModelProfile] = []
    reasons: dict[str, None] = {}
    with MemoryMeter() as meter, (phases or Phases()).phase("profile") as advance:
        for done, configuration in enumerate(configurations):
            inputs = given[configuration.batch]
            bench = _Bench(configuration, inputs, budget_s, clock, meter, reasons)
            rows += bench.rows(models, rows[-1].race + 1 if rows else 0)
            advance(done + 1, len(configurations))
    guesses = (note for inputs in given.values() for note in inputs.notes)
    return Profile(
        models=tuple(rows),
        provider=target.provider,
        threads=rows[0].threads,
        rounds=min(row.rounds for row in rows),
        disturbed=any(row.disturbed for row in rows),
        synthetic=feeds is None,
        notes=tuple(filter(None, dict.fromkeys((*guesses, *reasons, left_open(target))))),
        clock=clock.value,
        comparisons=_comparisons(rows),
        sweep={"threads": sweep.threads, "batch": sweep.batches, "levels": sweep.levels},
        environment={**environment(target), "memory": HOW},
    )


@dataclass(frozen=True)
class _Opened:
    """A file that was opened, at the level it runs fastest at."""

    path: Path
    level: str
    load_s: float
    placement: tuple[Placement, ...]


@dataclass(frozen=True)
class _Bench:
    """One combination of a sweep; `reasons` collects why something was not measured."""

    configuration: Configuration
    inputs: Inputs
    budget_s: float
    clock: Clock
    meter: MemoryMeter
    reasons: dict[str, None]

    def rows(self, models: Sequence[Path], first_race: int) -> list[ModelProfile]:
        """Every model, on one set of shapes after the other."""
        samples, target = self.inputs.samples, self.configuration.target
        opened = [_at_best(path, target, samples) for path in models]
        entries = [(entry.path, entry.level) for entry in opened]
        found: list[ModelProfile] = []
        for number, (feeds, _) in enumerate(samples, first_race):
            result = race(entries, target, [(feeds, 1.0)], self.budget_s / len(samples), _ENOUGH_RUNS, self.clock)
            found += [self._row(entry, feeds, result, index, number) for index, entry in enumerate(opened)]
        return found

    def _row(self, opened: _Opened, feeds: Feeds, result: Paired, index: int, number: int) -> ModelProfile:
        timing, target = result.timings[index], self.configuration.target
        batch = self.configuration.batch or next((array.shape[0] for array in feeds.values() if array.ndim), 1)
        memory = self.meter.peak(opened.path, target, opened.level, feeds)
        if memory.peak_bytes is None:
            self.reasons[f"memory of {opened.path.name} was not measured: {memory.reason}"] = None
        events, graph = _profiled(opened, feeds, target, timing.median_ms)
        nodes = attribute(events, graph)
        return ModelProfile(
            path=str(opened.path),
            level=opened.level,
            load_s=opened.load_s,
            size_bytes=file_bytes(opened.path),
            p50_ms=timing.median_ms,
            p95_ms=percentile(timing.runs_ms, 0.95),
            ratio=result.ratios[index],
            ratio_ci95=result.ci95[index],
            nodes=nodes,
            shapes={name: array.shape for name, array in feeds.items()},
            race=number,
            threads=target.threads,
            batch=batch,
            p50_ci95_ms=timing.ci95_ms,
            p99_ms=percentile(timing.runs_ms, 0.99),
            throughput=batch / timing.median_ms * 1e3,
            peak_memory_bytes=memory.peak_bytes,
            operators=by_operator(events, timing.median_ms),
            layers=by_layer(nodes, graph, timing.median_ms),
            rounds=result.rounds,
            runs=len(timing.runs_ms),
            clock=result.clock.value,
            disturbed=result.disturbed or (len(result.timings) == 1 and _wide(result)),
            placement=opened.placement,
        )


def percentile(runs_ms: Sequence[float], share: float) -> float | None:
    """Of single runs; None where they are too few to have a tail."""
    return float(np.quantile(runs_ms, share)) if len(runs_ms) >= _FEWEST_RUNS else None


def _wide(alone: Paired) -> bool:
    """Whether the median of a model without a rival is known too badly to be trusted."""
    low, high = alone.timings[0].ci95_ms
    return (high - low) / 2 > _WIDE * alone.timings[0].median_ms


def _require_runs(models: Sequence[Path], target: Target, samples: Sequence[Feeds]) -> None:
    """Refuse inputs that a model fails on before minutes have gone into those that it takes."""
    for path in models:
        session = open_session(path, target, target.levels[0])
        for feeds in samples:
            session.run(feeds)


def _comparisons(rows: Sequence[ModelProfile]) -> tuple[Comparison, ...]:
    first: dict[int, int] = {}
    return tuple(
        Comparison(
            start,
            position,
            layers=changes(rows[start].layers, row.layers),
            operators=changes(rows[start].operators, row.operators),
        )
        for position, row in enumerate(rows)
        if (start := first.setdefault(row.race, position)) != position
    )


def _at_best(path: Path, target: Target, samples: Sequence[Weighted]) -> _Opened:
    level = target.levels[0]
    if len(target.levels) > 1:
        ratios = race([(path, each) for each in target.levels], target, samples, _LEVEL_S).ratios
        level = target.levels[int(np.argmax(ratios))]
    start = time.perf_counter()
    session = open_session(path, target, level)
    return _Opened(path, level, time.perf_counter() - start, session.placement())


def _profiled(
    opened: _Opened, feeds: Feeds, target: Target, expected_ms: float
) -> tuple[list[KernelEvent], onnx.GraphProto]:
    """The kernels of a few runs, and the graph whose nodes they are to be led back to."""
    least, most = _PROFILED_RUNS
    runs = min(most, max(least, int(_PROFILED_MS / expected_ms)))
    model = onnx.load(opened.path, load_external_data=False)
    source: Path | bytes = opened.path
    if file_bytes(opened.path) == opened.path.stat().st_size < _IN_MEMORY_BYTES:
        name_nodes(model.graph)  # the profile says nothing about nodes without a name
        source = model.SerializeToString()
    with tempfile.TemporaryDirectory(prefix="onnx-lowrank-") as folder:
        session = open_session(source, target, opened.level, profile_to=Path(folder))
        for _ in range(runs + 1):
            session.run(feeds)
        events = session.profile_events()
    return _undisturbed(events, runs + 1), model.graph


def _undisturbed(events: list[KernelEvent], runs: int) -> list[KernelEvent]:
    """One run whose kernels took their median over the runs; the first one, which also allocates, is left out.

    A disturbance hits nearly every run of a busy machine, but each kernel in few of them.
    """
    size = len(events) // runs
    if len(events) % runs:  # runs of different length: loops and branches
        return events[size:]
    return [
        replace(event, microseconds=float(np.median([other.microseconds for other in events[size + place :: size]])))
        for place, event in enumerate(events[:size])
    ]
