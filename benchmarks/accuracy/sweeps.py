"""The sweeps of budgets: which networks, which goals, and the columns of their tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.accuracy.experiment import Case
from benchmarks.fashion import NETS
from benchmarks.zoo.model import ZooModel
from benchmarks.zoo.models import all_models

SIXTY_FOUR_TOKENS = ("input_ids=1x64", "attention_mask=1x64")


@dataclass(frozen=True)
class Sweep:
    """Some networks at some budgets.

    Attributes:
        models: What is optimized.
        option: The goal, as an option of `optimize`.
        values: Its values by default.
        metrics: Columns of the task metric, beside the others.
        methods: Keys of METHODS, by default.
        options: Further options of `optimize`.
        shapes: Shapes to time with; those of the zoo by default.
        metric: Measured by the command itself, too.
    """

    models: tuple[ZooModel, ...]
    option: str
    values: tuple[float, ...]
    metrics: tuple[str, ...]
    methods: tuple[str, ...] = ("calibrated",)
    options: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    metric: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the printed table."""
        metrics = (f"{name}{part}" for name in self.metrics for part in ("", "_original", "_drop_ci95"))
        return ("macs_kept", "speedup", "ci95", *metrics, "evaluation_error", "seconds", "error")

    def cases(self, values: Sequence[float], methods: Sequence[str], threads: int) -> Iterator[Case]:
        """Every model at every budget by every method."""
        options = ("--threads", str(threads), *self.options)
        for model in self.models:
            for value in values:
                for method in methods:
                    yield Case(model, method, (self.option, f"{value:g}"), options, self.shapes, self.metric)


def fashion(names: Sequence[str]) -> Sweep:
    """Networks on Fashion-MNIST; MACs kept are those of the whole network."""
    models = tuple(NETS[name] for name in names)
    methods = ("calibrated", "calibrated_closed", "energy", "minimax")
    keep = (0.5, 0.4, 0.3, 0.2)
    return Sweep(models, "--keep-macs", keep, ("top1",), methods, ("--of", "all"), metric="top1")


def zoo(name: str) -> Sweep:
    """A model of the zoo; `minilm_fast` asks the same of it in milliseconds."""
    models, factorable = (all_models()[name.removesuffix("_fast")],), ("--of", "factorable")
    match name:
        case "hed":
            return Sweep(models, "--speedup", (2.9, 3.9, 4.9, 6.0), ("edge_f1", "edge_f1_exact"))
        case "ocr_rec":
            metrics = ("cer_clean", "cer_hard", "letter_error_clean", "letter_error_hard")
            return Sweep(models, "--keep-macs", (0.9, 0.7, 0.6, 0.5), metrics, options=factorable)
        case "efficientnet":
            metrics = ("top1_agreement", "top1_accuracy")
            return Sweep(models, "--keep-macs", (0.9, 0.8, 0.7), metrics, options=factorable)
        case "minilm":
            keep = (0.8, 0.7, 0.6, 0.5)
            return Sweep(models, "--keep-macs", keep, ("probe_accuracy",), options=factorable, shapes=SIXTY_FOUR_TOKENS)
        case "minilm_fast":
            return Sweep(models, "--speedup", (1.8,), ("probe_accuracy",), shapes=SIXTY_FOUR_TOKENS)
        case _:
            raise KeyError(name)


ZOO = ("hed", "ocr_rec", "efficientnet", "minilm", "minilm_fast")
