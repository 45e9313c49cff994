"""What the user wants: at most one goal, each a number with a unit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from onnx_lowrank.errors import InputError


@dataclass(frozen=True)
class Goal:
    """Base of all goals.

    Args:
        value: The number the user asked for; its unit and range depend on the goal.

    Raises:
        InputError: if `value` is not finite or outside the goal's range.
    """

    value: float
    kind: ClassVar[str]
    lower: ClassVar[float] = 0.0
    upper: ClassVar[float] = math.inf
    unit: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Check the range."""
        if not (math.isfinite(self.value) and self.lower < self.value <= self.upper):
            span = f"a number above {self.lower:g}" + (f", at most {self.upper:g}" if math.isfinite(self.upper) else "")
            raise InputError(f"--{self.kind} {self.value:g}", span, "give another value")

    def __str__(self) -> str:
        return f"{self.kind} {self.value:g}{self.unit}"


@dataclass(frozen=True)
class Speedup(Goal):
    """Latency of the original model divided by that of the optimized one, measured in turns."""

    kind: ClassVar[str] = "speedup"
    lower: ClassVar[float] = 1.0
    unit: ClassVar[str] = "x"


@dataclass(frozen=True)
class LatencyMs(Goal):
    """Milliseconds of one run of the optimized model."""

    kind: ClassVar[str] = "latency-ms"
    unit: ClassVar[str] = " ms"


@dataclass(frozen=True)
class MaxError(Goal):
    """The fastest model whose outputs are at most this far from the original's, in the chosen error metric."""

    kind: ClassVar[str] = "max-error"


@dataclass(frozen=True)
class MaxDrop(Goal):
    """The fastest model whose mean task metric on the labelled samples is at most this much below the original's."""

    kind: ClassVar[str] = "max-drop"


@dataclass(frozen=True)
class KeepMacs(Goal):
    """Share of multiply-accumulates that may remain."""

    kind: ClassVar[str] = "keep-macs"
    upper: ClassVar[float] = 1.0


@dataclass(frozen=True)
class KeepParams(Goal):
    """Share of parameters that may remain."""

    kind: ClassVar[str] = "keep-params"
    upper: ClassVar[float] = 1.0


DEFAULT_GOAL = MaxError(0.01)
"""Where none is stated: it is aimed at, and missing it on other samples is told; a stated limit is never exceeded."""
GOALS: tuple[type[Goal], ...] = (Speedup, LatencyMs, MaxError, MaxDrop, KeepMacs, KeepParams)


def one_goal(given: dict[str, float | None]) -> Goal:
    """The one goal among the options given, `DEFAULT_GOAL` if there is none.

    Args:
        given: kind -> value or None, as the command line delivers them.

    Raises:
        InputError: if more than one goal is given, or its value is out of range.
    """
    chosen = [goal for goal in GOALS if given.get(goal.kind) is not None]
    if len(chosen) > 1:
        names = ", ".join(f"--{goal.kind}" for goal in chosen)
        raise InputError(f"the goals {names}", "at most one goal", "leave one of them")
    if not chosen:
        return DEFAULT_GOAL
    value = given[chosen[0].kind]
    assert value is not None  # noqa: S101 - narrowed by the selection above
    return chosen[0](value)
