"""What a benchmark found: one row per file and set of conditions, and the rows side by side. `to_json` is its file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from onnx_lowrank.latency.measure import Interval
from onnx_lowrank.layer import Shape
from onnx_lowrank.placement import Placement


@dataclass(frozen=True)
class NodeTime:
    """Share of one node of the user's model; `(runtime)` collects what onnxruntime added, layout changes above all.

    `ops` are the kernels that ran for it.
    """

    node: str
    ops: tuple[str, ...]
    share: float


@dataclass(frozen=True)
class TimeShare:
    """Part of a run that an operator or a layer takes: the profiler's share, and that share of the median, in ms."""

    name: str
    share: float
    ms: float


@dataclass(frozen=True)
class ModelProfile:
    """One file under one set of conditions.

    Args:
        path: The file.
        level: Graph optimization level; where none was asked for, the fastest one over all sets of shapes, or the first
            one to try where the file fails on a set, or at another level.
        load_s: Seconds from file to session; the file has been read before.
        size_bytes: The file and the external data it names.
        p50_ms: Median latency of one run over the rounds that nothing disturbed, on the clock that `clock` names.
        p95_ms: 95th percentile of all single runs, of disturbed rounds too, on the wall clock: what a caller waits for;
            None: fewer than 20 runs, none of which lies beyond it.
        ratio: Latency of the first file / latency of this one, on the same inputs; above 1 is faster.
        ratio_ci95: Its 95 % interval: order statistics of the sign test, see `latency.estimate`.
        nodes: Largest share first.
        shapes: Of the inputs, by name.
        race: Number of the race: rows with the same one were timed in turns, on the same inputs.
        threads: Intra-op threads.
        batch: Samples in one run: the batch asked for, else the leading dimension of the first input that has one.
        p50_ci95_ms: Likewise, of the median.
        p99_ms: 99th percentile of the same runs, None where p95 is; of fewer than 100 it is close to the slowest.
        throughput: Samples per second: batch / p50.
        peak_memory_bytes: Most host memory that loading and running take, a device's own memory not counted; None: not
            measured, `Profile.notes` say why.
        operators: Time by the kernels that ran, largest share first.
        layers: Time by the user's layers, largest share first: the stages of a chain count for the layer it replaced.
        rounds: Samples the median is of: the undisturbed rounds, in each of which the file runs once or several times.
        runs: Single runs that p95 and p99 are of.
        clock: What p50, its interval, the ratio and the throughput were read on, "cpu" or "wall" (see `measure.Clock`);
            the same for all rows of a sweep.
        disturbed: The machine was too busy to trust this race.
        placement: Which provider runs which operators, most nodes first; empty where onnxruntime cannot tell.
    """

    path: str
    level: str
    load_s: float
    size_bytes: int
    p50_ms: float
    p95_ms: float | None
    ratio: float
    ratio_ci95: Interval
    nodes: tuple[NodeTime, ...]
    shapes: Mapping[str, Shape]
    race: int
    threads: int
    batch: int
    p50_ci95_ms: Interval
    p99_ms: float | None
    throughput: float
    peak_memory_bytes: int | None
    operators: tuple[TimeShare, ...]
    layers: tuple[TimeShare, ...]
    rounds: int
    runs: int
    clock: str
    disturbed: bool
    placement: tuple[Placement, ...] = ()


@dataclass(frozen=True)
class Failure:
    """A file that was not timed under one set of conditions, because it failed, or the first file of its race did.

    Args:
        path: The file.
        threads: Intra-op threads.
        batch: As for `ModelProfile`.
        levels: Graph optimization levels it was to run at the best of.
        shapes: Of the inputs, by name.
        reason: A sentence.
    """

    path: str
    threads: int
    batch: int
    levels: tuple[str, ...]
    shapes: Mapping[str, Shape]
    reason: str


@dataclass(frozen=True)
class Change:
    """An operator or layer before and after; None where a model spends no time on it.

    Shares are of the whole run; `faster` is before / after, without interval: profiles attribute, they do not measure.
    """

    name: str
    before_ms: float | None
    after_ms: float | None
    before_share: float | None
    after_share: float | None
    faster: float | None


@dataclass(frozen=True)
class Comparison:
    """The first file of a race beside another one.

    Args:
        before: Position of the first file's row in `Profile.models`.
        after: Position of the other one's.
        layers: By the user's layers, what took longest before first.
        operators: By the kernels that ran.
    """

    before: int
    after: int
    layers: tuple[Change, ...]
    operators: tuple[Change, ...]


@dataclass(frozen=True)
class Profile:
    """Several files timed in turns, under every set of conditions of a sweep.

    Args:
        models: All files, in the order given, for the first threads, batch, level and set of shapes, then for the next;
            those that failed are in `failures`.
        provider: Execution provider.
        threads: Intra-op threads of the first row; every row has its own.
        rounds: Of the row with the fewest.
        disturbed: The machine was too busy to trust the ratios of one race or more; rows say which.
        synthetic: The inputs were made up; `notes` says which dimensions were.
        notes: Sentences.
        clock: Of every row.
        comparisons: The first file of every race beside each other one.
        sweep: What was asked for: threads, batches and levels; nothing where it was left open.
        environment: What the numbers depend on: versions, processor, provider and its options.
        failures: Files that were not timed under some conditions.
        schema: Of the JSON.
    """

    models: tuple[ModelProfile, ...]
    provider: str
    threads: int
    rounds: int
    disturbed: bool
    synthetic: bool
    notes: tuple[str, ...]
    clock: str
    comparisons: tuple[Comparison, ...]
    sweep: Mapping[str, tuple[int | str, ...]]
    environment: Mapping[str, object]
    failures: tuple[Failure, ...] = ()
    schema: int = 1

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)

    def to_json(self) -> str:
        """The result as JSON."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

    def races(self) -> list[list[ModelProfile]]:
        """The rows that were timed in turns, race by race."""
        groups: dict[int, list[ModelProfile]] = {}
        for row in self.models:
            groups.setdefault(row.race, []).append(row)
        return list(groups.values())
