"""What a comparison of formats holds, field by field (schema 1): `to_json` is what `compare --json` prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from onnx_lowrank.goals import Goal
from onnx_lowrank.report.model import Accuracy, Interval
from onnx_lowrank.search.matched import share_of


@dataclass(frozen=True)
class Budget:
    """What formats are compared at.

    Args:
        kind: keep-macs, keep-params or speedup.
        value: As the user gave it.
        share: How much may remain of what it limits, in every layer and in the network.
    """

    kind: str
    value: float
    share: float

    @classmethod
    def of(cls, goal: Goal) -> Self:
        """The budget a goal sets."""
        return cls(goal.kind, goal.value, share_of(goal))

    def __str__(self) -> str:
        """As an option of `optimize`."""
        return f"{self.kind} {self.value:g}"

    @property
    def words(self) -> str:
        """What may remain, for a heading."""
        of = {"keep-macs": "the MACs", "keep-params": "the parameters", "speedup": "the time"}[self.kind]
        return f"{self.share:.3g} of {of}"


@dataclass(frozen=True)
class Contender:
    """The best of one format for one layer within one budget.

    Args:
        budget: Of `Comparison.budgets`, as text.
        format: Name of the decomposition.
        rank: Its rank; empty where no rank was found within the budget.
        error: Relative error in the metric of the layer, see `LayerComparison.metric`; without refit.
        params: Weights.
        macs: Multiply-accumulates per run of the model.
        ms: Latency of the chain alone, in turns with the layer and the other contenders; None where it was not timed.
        of_layer: The same as a share of the layer's own latency: below 1 is faster.
        ci95: 95 % interval of `of_layer`.
        beyond: Whether it is beyond a budget of speed when timed again, like the one that was to take its place.
        front: Whether no contender for this layer, and not the layer as it is, has as little error in less time.
        reason: Why there is no rank.
    """

    budget: str
    format: str
    rank: tuple[int, ...] = ()
    error: float | None = None
    params: int | None = None
    macs: float | None = None
    ms: float | None = None
    of_layer: float | None = None
    ci95: Interval | None = None
    beyond: bool = False
    front: bool = False
    reason: str = ""


@dataclass(frozen=True)
class LayerComparison:
    """One layer in every format.

    Args:
        name: The node.
        op: Its operator.
        shape: Of the weight.
        params: Weights.
        macs: Multiply-accumulates per run.
        ms: Latency of the layer alone; None where it was not timed.
        metric: What errors are relative to: "outputs" of the layer on the samples, or the "weight" where it has none.
        contenders: By budget and format.
        refusals: Format -> the sentence why it does not take the layer.
    """

    name: str
    op: str
    shape: str
    params: int
    macs: float
    ms: float | None
    metric: str
    contenders: tuple[Contender, ...]
    refusals: dict[str, str]


@dataclass(frozen=True)
class NetworkComparison:
    """The whole network within one budget by some formats, realised, refitted where there are samples, and measured.

    Args:
        budget: Of `Comparison.budgets`, as text.
        name: The format, or "default" or "all" for several that the allocator mixes freely.
        formats: Which were allowed.
        reached: Whether the finished model is within the budget.
        reason: How near it came, or why nothing was built; then all that follows is None.
        used: Format -> layers that became it.
        relative_error: Of the outputs, on held-out samples or synthetic inputs.
        accuracy: The task metric; None without labelled samples.
        params: Of the finished model.
        macs: Of the finished model, per run.
        ms: Latency of the finished model.
        speedup: Original / finished model, in turns.
        ci95: 95 % interval of `speedup`.
        low_rank_speedup: Normalized, without factorization / finished model.
        low_rank_ci95: 95 % interval of it.
        disturbed: Whether other load was noticed while timing.
        seconds: What allocation, refit and measurements of this row took.
        file: The model, if it was kept.
        same_as: The row before whose choice of ranks this is, and whose figures these are therefore; empty: none.
        front: Whether no network compared, and not the original, has as little error and is as fast.
    """

    budget: str
    name: str
    formats: tuple[str, ...]
    reached: bool
    reason: str
    used: dict[str, int] = field(default_factory=dict[str, int])
    relative_error: float | None = None
    accuracy: Accuracy | None = None
    params: int | None = None
    macs: float | None = None
    ms: float | None = None
    speedup: float | None = None
    ci95: Interval | None = None
    low_rank_speedup: float | None = None
    low_rank_ci95: Interval | None = None
    disturbed: bool = False
    seconds: float = 0.0
    file: str | None = None
    same_as: str = ""
    front: bool = False


@dataclass(frozen=True)
class Comparison:
    """Everything that was found out.

    Args:
        model: The file.
        target: Provider, threads and shapes.
        budgets: What was matched.
        params: Of the original.
        macs: Of the original, per run.
        layers: Layer by layer.
        networks: Whole networks.
        data: What errors of outputs are measured on, in words.
        timings: Seconds per phase.
        environment: Versions and processor.
        notes: What the user should know.
    """

    model: str
    target: dict[str, Any]
    budgets: tuple[Budget, ...]
    params: int
    macs: float
    layers: tuple[LayerComparison, ...]
    networks: tuple[NetworkComparison, ...]
    data: str
    timings: dict[str, float]
    environment: dict[str, Any]
    notes: tuple[str, ...] = ()
    schema: int = field(default=1)

    def to_json(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), indent=1, allow_nan=False, default=str) + "\n"


def on_front(points: Sequence[tuple[float, float] | None]) -> list[bool]:
    """Which (error, time) no other has both of at most, one of them less; None is on no front.

    Args:
        points: Something to be left out may stand among them, such as (0, 1) for what nothing was done to.
    """
    known = [point for point in points if point is not None]
    return [
        point is not None
        and not any(other != point and other[0] <= point[0] and other[1] <= point[1] for other in known)
        for point in points
    ]
