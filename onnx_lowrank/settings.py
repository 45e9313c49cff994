"""Everything a user can ask of `optimize`, beside the model and where to write."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from onnx_lowrank.errors import InputError
from onnx_lowrank.goals import DEFAULT_GOAL, Goal, MaxDrop
from onnx_lowrank.plan import MEMORY_LIMIT, PassSpec
from onnx_lowrank.target import Target


@dataclass(frozen=True)
class Settings:
    """Options of `optimize` and `plan`, named as on the command line.

    Args:
        goal: What is wanted.
        target: Where the model will run.
        calibration: Unlabelled samples: an .npz file, a folder of arrays or images, or `module:function`. They give the
            input shapes, the inputs layers are fitted on, and the fidelity figures.
        preprocess: How images become arrays; None: as preprocess.txt in their folder says.
        samples: How many samples of `calibration` are used at most.
        refit: Whether layers are fitted to the original's outputs on `calibration`; without, chains still approximate
            the weights in the metric of their inputs there, and biases take up the means that are lost.
        eval: Labelled samples for `metric`, from the same kinds of sources.
        metric: Task metric: top1, top5, mse, cosine or `module:function`.
        error_metric: What a max-error goal limits: relative, cosine, kl, top1 or worst.
        passes: Graph passes and decompositions; where one kind is not named, all of that kind are used.
        allocator: Name of the rank rule.
        of: What keep-macs and keep-params are shares of: "all" or "factorable" layers.
        only: Patterns of layers that may be rewritten; empty means all.
        keep: Patterns of layers that stay.
        seed: Of inputs drawn to fit the signature, of rules that search at random, and of intervals of the task
            metric. Parts and positions of samples are drawn by a fixed seed.
        time_limit: Seconds after which the search ends with the best found; None for no limit.
        memory_limit: Bytes that decomposed weights may take in memory, and moments of one layer: larger ones are taken
            in the row space of its weight, or the layer stays data-free.
        bisect: Look for the first rewrite after which outputs differ by more than the goal's limit.
        evaluations: How many choices a rule that searches may measure.
    """

    goal: Goal = DEFAULT_GOAL
    target: Target = field(default_factory=Target)
    calibration: Path | str | None = None
    preprocess: str | None = None
    samples: int = 2048
    refit: bool = True
    eval: Path | str | None = None
    metric: str = "top1"
    error_metric: str = "relative"
    passes: tuple[PassSpec, ...] = ()
    allocator: str = "knapsack"
    of: str = "all"
    only: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    seed: int = 0
    time_limit: float | None = None
    memory_limit: int = MEMORY_LIMIT
    bisect: bool = False
    evaluations: int = 100

    def __post_init__(self) -> None:
        """Refuse a goal that nothing is given to measure on."""
        if isinstance(self.goal, MaxDrop) and self.eval is None:
            raise InputError(f"--{self.goal} without --eval", "labelled samples to measure the drop on", "give --eval")

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
