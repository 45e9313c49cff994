"""Model files timed against each other in turns, and where each one's time goes, node by node.

A file that fails under some conditions costs its rows under these, not the sweep. Files meet every set of conditions in
the measuring process first, which may die of them; this process opens only those that ran there.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from onnx_lowrank.errors import InputError, LowRankError
from onnx_lowrank.graph import io
from onnx_lowrank.graph.size import file_bytes
from onnx_lowrank.latency.child import MeasuringError
from onnx_lowrank.latency.environment import environment
from onnx_lowrank.latency.measure import Clock, Paired
from onnx_lowrank.latency.race import Weighted, common_clock, race, race_those_that_run, refusal
from onnx_lowrank.placement import Placement
from onnx_lowrank.profile.attribution import attribute, by_layer, by_operator, changes
from onnx_lowrank.profile.inputs import Inputs, drawn
from onnx_lowrank.profile.kernels import profiled
from onnx_lowrank.profile.memory import HOW, MemoryMeter
from onnx_lowrank.profile.model import Comparison, Failure, ModelProfile, Profile
from onnx_lowrank.profile.sweep import Configuration, Sweep, left_open
from onnx_lowrank.progress import Phases
from onnx_lowrank.runtime import open_session
from onnx_lowrank.signature import Feeds
from onnx_lowrank.target import Target

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
        InputError: if a file cannot be loaded, takes none of the inputs of a sweep, or no file takes any.
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
    found = _Found()
    with MemoryMeter() as meter, (phases or Phases()).phase("profile") as advance:
        for done, configuration in enumerate(configurations):
            inputs = given[configuration.batch]
            _Bench(configuration, inputs, budget_s, clock, meter, found).run(models)
            advance(done + 1, len(configurations))
    rows = found.rows
    if not rows:
        raise found.errors[0]
    guesses = (note for inputs in given.values() for note in inputs.notes)
    return Profile(
        models=tuple(rows),
        provider=target.provider,
        threads=rows[0].threads,
        rounds=min(row.rounds for row in rows),
        disturbed=any(row.disturbed for row in rows),
        synthetic=feeds is None,
        notes=tuple(filter(None, dict.fromkeys((*guesses, *found.reasons, left_open(target))))),
        clock=clock.value,
        comparisons=_comparisons(rows),
        sweep={"threads": sweep.threads, "batch": sweep.batches, "levels": sweep.levels},
        environment={**environment(target), "memory": HOW},
        failures=tuple(found.failures),
    )


@dataclass(frozen=True)
class _Found:
    """What came out so far; `errors` are behind the failures, `reasons` say what of a row was not measured."""

    rows: list[ModelProfile] = field(default_factory=list[ModelProfile])
    failures: list[Failure] = field(default_factory=list[Failure])
    errors: list[LowRankError] = field(default_factory=list[LowRankError])
    reasons: dict[str, None] = field(default_factory=dict[str, None])


@dataclass
class _Entry:
    """A file at the level it runs fastest at; opened in this process once the measuring one has run it."""

    path: Path
    level: str
    load_s: float = 0.0
    placement: tuple[Placement, ...] | None = None

    def open(self, target: Target) -> None:
        """Time the opening, once."""
        if self.placement is None:
            start = time.perf_counter()
            session = open_session(self.path, target, self.level)
            self.load_s, self.placement = time.perf_counter() - start, session.placement()


@dataclass(frozen=True)
class _Bench:
    """One combination of a sweep."""

    configuration: Configuration
    inputs: Inputs
    budget_s: float
    clock: Clock
    meter: MemoryMeter
    found: _Found

    def run(self, models: Sequence[Path]) -> None:
        """Every model, on one set of shapes after the other: a row or a failure of each."""
        samples, target = self.inputs.samples, self.configuration.target
        entries = [_Entry(path, _best_level(path, target, samples)) for path in models]
        for feeds, _ in samples:
            rows, refused = self._raced(entries, feeds, self.found.rows[-1].race + 1 if self.found.rows else 0)
            self.found.rows.extend(rows)
            self.found.errors.extend(refused.values())
            for index, path in enumerate(models):
                if index in refused:
                    self._fail(path, feeds, str(refused[index]))
                elif 0 in refused:
                    self._fail(path, feeds, f"{models[0].name}, which it is compared with, failed")

    def _raced(
        self, entries: Sequence[_Entry], feeds: Feeds, number: int
    ) -> tuple[list[ModelProfile], dict[int, LowRankError]]:
        """Rows of the files that ran, none where the first did not, and the errors of the others."""
        target, budget_s = self.configuration.target, self.budget_s / len(self.inputs.samples)
        files = [(entry.path, entry.level) for entry in entries]
        result = race_those_that_run(files, target, [(feeds, 1.0)], budget_s, _ENOUGH_RUNS, self.clock)
        refused, rows = dict(result.refused), list[ModelProfile]()
        standing = [index for index in range(len(entries)) if index not in refused]
        for place, index in enumerate(standing):
            if 0 in refused or result.paired is None:
                break
            try:
                rows.append(self._row(entries[index], feeds, result.paired, place, number))
            except LowRankError as error:
                refused[index] = error
        return rows, refused

    def _fail(self, path: Path, feeds: Feeds, reason: str) -> None:
        target, batch = self.configuration.target, self._batch(feeds)
        shapes = {name: array.shape for name, array in feeds.items()}
        self.found.failures.append(Failure(str(path), target.threads, batch, target.levels, shapes, reason))

    def _batch(self, feeds: Feeds) -> int:
        return self.configuration.batch or next((array.shape[0] for array in feeds.values() if array.ndim), 1)

    def _row(self, entry: _Entry, feeds: Feeds, result: Paired, place: int, number: int) -> ModelProfile:
        timing, target, batch = result.timings[place], self.configuration.target, self._batch(feeds)
        entry.open(target)
        memory = self.meter.peak(entry.path, target, entry.level, feeds)
        if memory.peak_bytes is None:
            self.found.reasons[f"memory of {entry.path.name} was not measured: {memory.reason}"] = None
        events, graph = profiled(entry.path, entry.level, feeds, target, timing.median_ms)
        nodes = attribute(events, graph)
        return ModelProfile(
            path=str(entry.path),
            level=entry.level,
            load_s=entry.load_s,
            size_bytes=file_bytes(entry.path),
            p50_ms=timing.median_ms,
            p95_ms=percentile(timing.runs_ms, 0.95),
            ratio=result.ratios[place],
            ratio_ci95=result.ci95[place],
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
            placement=entry.placement or (),
        )


def percentile(runs_ms: Sequence[float], share: float) -> float | None:
    """Of single runs; None where they are too few to have a tail."""
    return float(np.quantile(runs_ms, share)) if len(runs_ms) >= _FEWEST_RUNS else None


def _wide(alone: Paired) -> bool:
    """Whether the median of a model without a rival is known too badly to be trusted."""
    low, high = alone.timings[0].ci95_ms
    return (high - low) / 2 > _WIDE * alone.timings[0].median_ms


def _require_runs(models: Sequence[Path], target: Target, samples: Sequence[Feeds]) -> None:
    """Refuse a file that takes none of the inputs before minutes go into others; one that dies is left to the races."""
    for path in models:
        errors = [refusal(path, target.levels[0], target, feeds) for feeds in samples]
        if errors[0] is not None and not any(error is None or isinstance(error, MeasuringError) for error in errors):
            raise errors[0]


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


def _best_level(path: Path, target: Target, samples: Sequence[Weighted]) -> str:
    """The fastest level over all samples; the first one where the file fails at a level or on a sample."""
    if len(target.levels) == 1:
        return target.levels[0]
    try:
        ratios = race([(path, level) for level in target.levels], target, samples, _LEVEL_S).ratios
    except LowRankError:
        return target.levels[0]
    return target.levels[int(np.argmax(ratios))]
