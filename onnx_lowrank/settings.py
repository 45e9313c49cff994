"""Everything a user can ask of `optimize`, beside the model and where to write."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from onnx_lowrank.errors import InputError
from onnx_lowrank.goals import DEFAULT_GOAL, Goal
from onnx_lowrank.plan import PassSpec
from onnx_lowrank.target import Target


@dataclass(frozen=True)
class Settings:
    """Options of `optimize` and `plan`, named as on the command line.

    Args:
        goal: What is wanted.
        target: Where the model will run.
        calibration: Unlabelled samples (.npz): they give the input shapes and the fidelity figures.
        eval: Labelled samples (.npz) for `metric`.
        metric: Task metric: top1, top5, mse or cosine.
        passes: Graph passes and decompositions; where one kind is not named, all of that kind are used.
        allocator: Name of the rank rule.
        of: What keep-macs and keep-params are shares of: "all" or "factorable" layers.
        only: Patterns of layers that may be rewritten; empty means all.
        keep: Patterns of layers that stay.
        seed: Of everything random.
        time_limit: Seconds after which the search ends with the best found; None for no limit.
        memory_limit: Bytes the search may hold in decomposed weights.
        bisect: Look for the first rewrite after which outputs differ by more than the goal's limit.
    """

    goal: Goal = DEFAULT_GOAL
    target: Target = field(default_factory=Target)
    calibration: Path | None = None
    eval: Path | None = None
    metric: str = "top1"
    passes: tuple[PassSpec, ...] = ()
    allocator: str = "knapsack"
    of: str = "all"
    only: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    seed: int = 0
    time_limit: float | None = None
    memory_limit: int = 1 << 30
    bisect: bool = False

    def require_matches(self, names: Collection[str]) -> None:
        """Refuse patterns that match none of `names`: a typing error would pin nothing, or everything.

        Raises:
            InputError: naming the pattern.
        """
        for option, patterns in (("--keep", self.keep), ("--only", self.only)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in names):
                    raise InputError(
                        f"{option} {pattern}, which matches no weight-bearing node",
                        "a pattern that matches one",
                        "list them with `onnx-lowrank inspect`",
                    )

    def pinned(self, *names: str) -> str | None:
        """Why a node that goes by `names` must stay as it is, or None."""
        for pattern in self.keep:
            if any(fnmatchcase(name, pattern) for name in names):
                return f"pinned by --keep {pattern}"
        if self.only and not any(fnmatchcase(name, pattern) for name in names for pattern in self.only):
            return f"not named by --only {' '.join(self.only)}"
        return None
