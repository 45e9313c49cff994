"""The report: what `report.json` holds, field by field (schema 1). Every figure is taken from the files on disk."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from onnx_lowrank.errors import InputError
from onnx_lowrank.goals import LatencyMs, Speedup
from onnx_lowrank.graph.io import write_text
from onnx_lowrank.search.bisection import Blame

Interval = tuple[float, float]


@contextlib.contextmanager
def folder_for(report: Path | None) -> Generator[None]:
    """The folder a report goes to, made before the work starts; a new one is gone again if the work fails.

    Raises:
        InputError: if it cannot be made.
    """
    new = report is not None and not report.exists()
    try:
        if report is not None:
            report.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{report} ({error.strerror})", "a folder for the report", "choose another") from error
    try:
        yield
    except BaseException:
        if new and report is not None:
            report.rmdir()
        raise


@dataclass(frozen=True)
class LayerRow:
    """One weight-bearing node: the decision and the reason in words.

    Latencies are per run of the model; that of the layer and that of its chain include the same activation and, in
    front of a convolution, the same small one (see `micro_model`).

    `source` is "measured" or "estimated" where there are latencies, else None.
    """

    name: str
    op: str
    shape: str
    decision: str
    method: str
    rank: tuple[int, ...]
    reason: str
    error: float
    params_before: int
    params_after: int
    macs_before: float
    macs_after: float
    latency_ms_before: float | None
    latency_ms_after: float | None
    source: str | None = None
    error_refit: float | None = None
    predicted_loss: float | None = None


@dataclass(frozen=True)
class GoalRow:
    """The goal, and whether the finished model reached it."""

    kind: str
    value: float
    reached: bool
    reason: str


@dataclass(frozen=True)
class Latency:
    """Milliseconds per run, median; the three models timed in turns, each at its best optimization level.

    Args:
        before_ms: The original.
        normalized_ms: After the exact rewrites, before any factorization.
        after_ms: The optimized model.
        predicted_ms: What the search expected, fixed before the optimized model was first timed as a share of the
            normalized model's latency; in milliseconds of this race, as a machine's speed drifts by a third in minutes.
        predicted_low_rank_speedup: The same as normalized / after: free of the drift of the machine's speed in between.
        speedup: before / after, median of the ratios of neighbouring runs.
        low_rank_speedup: normalized / after, likewise.
        after_ci95_ms: 95 % interval of `after_ms`.
        ci95: 95 % interval of `speedup`.
        low_rank_ci95: 95 % interval of `low_rank_speedup`.
        samples: Rounds of paired runs.
        clock: "wall", or "cpu": the time the one thread ran, which other processes do not disturb.
        disturbed: Whether other load was noticed while timing.
        levels: Best optimization level of each model.
    """

    before_ms: float
    normalized_ms: float
    after_ms: float
    predicted_ms: float
    predicted_low_rank_speedup: float
    speedup: float
    low_rank_speedup: float
    after_ci95_ms: Interval
    ci95: Interval
    low_rank_ci95: Interval
    samples: int
    clock: str
    disturbed: bool
    levels: dict[str, str]

    def standing(self, goal: Speedup | LatencyMs) -> float:
        """How much of a goal of speed is reached at the slow end of the interval; 1: all of it."""
        return self.ci95[0] / goal.value if isinstance(goal, Speedup) else goal.value / self.after_ci95_ms[1]


@dataclass(frozen=True)
class Size:
    """Parameters, multiply-accumulates per run and bytes on disk of the two files.

    Multiply-accumulates before are counted after the exact rewrites, which change none but fold constants.
    """

    params_before: int
    params_after: int
    macs_before: float
    macs_after: float
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Accuracy:
    """Task metric before and after on the labelled samples of --eval."""

    metric: str
    before: float
    after: float
    ci95: Interval
    ci95_before: Interval
    ci95_after: Interval
    samples: int


@dataclass(frozen=True)
class Sampling:
    """Where the samples of --calibration came from, and what each of them was for.

    Args:
        origin: The file, folder or function, as the user named it.
        fitted: Samples that layers were fitted on; 0 without calibration.
        judged: Others, that fits were chosen by and losses probed on.
        held_out: Others, that are only reported on.
        sources: How many photographs, documents or speakers they are of; None where the samples do not say. None of
            them is in two parts, unless a note says so.
        positions: Node -> rows (output pixels, tokens) its moments were taken from, for every calibrated layer.
        seed: What parts and positions are drawn with; the same in every run.
    """

    origin: str
    fitted: int
    judged: int
    held_out: int
    sources: int | None
    positions: dict[str, int]
    seed: int


@dataclass(frozen=True)
class Loss:
    """Damage to the outputs: predicted, measured likewise, and what the finished model shows.

    The prediction knows nothing of the refit, which repairs part of the damage, so it is compared with what the same
    choice loses without refit, on the samples it was predicted from.

    Args:
        predicted: Sum of the losses of the chosen chains, each probed alone; the search went by it.
        measured: Of the written model, on the samples held out.
        samples: How many those are.
        without_refit: Of all chosen chains together, without refit; None where nothing was rewritten.
        judged_on: On how many samples; the prediction is from the same ones.
        agreement: `without_refit` / `predicted`: 1 where losses of layers add up; None where nothing is predicted.
    """

    predicted: float
    measured: float
    samples: int
    without_refit: float | None = None
    judged_on: int | None = None
    agreement: float | None = None


@dataclass(frozen=True)
class Dropped:
    """A candidate that could not be timed or realised."""

    layer: str
    candidate: str
    reason: str


@dataclass(frozen=True)
class Report:
    """Everything that was found out; `to_json` is report.json."""

    model: dict[str, Any]
    target: dict[str, Any]
    goal: GoalRow
    layers: tuple[LayerRow, ...]
    latency: Latency | None
    fidelity: dict[str, Any]
    accuracy: Accuracy | None
    size: Size
    timings: dict[str, float]
    peak_rss_mib: float | None  # where the system tells it: not on Windows
    dropped: tuple[Dropped, ...]
    environment: dict[str, Any]
    passes: tuple[dict[str, Any], ...]
    notes: tuple[str, ...] = ()
    bisect: Blame | None = None
    loss: Loss | None = None
    calibration: str = "data-free"
    samples: Sampling | None = None
    training: str = "none"
    chains_timed: int = 0
    schema: int = field(default=1)

    @property
    def factorized(self) -> int:
        """Number of nodes that were rewritten."""
        return sum(row.decision == "factorized" for row in self.layers)

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(asdict(self), indent=1, allow_nan=False, default=str) + "\n"

    def write(self, folder: Path) -> Path:
        """Write `report.json` into `folder`, which is made if needed.

        Raises:
            InputError: if it cannot be written.
        """
        path = folder / "report.json"
        with folder_for(folder):
            write_text(path, self.to_json())
        return path
