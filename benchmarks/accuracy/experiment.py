"""One measured case: a model through the command line, then the written file against the original on the task."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import command
from benchmarks.command import span
from benchmarks.zoo import results
from benchmarks.zoo.cache import default_cache
from benchmarks.zoo.evaluate import evaluate
from benchmarks.zoo.model import ZooModel
from benchmarks.zoo.results import Scalar
from onnx_lowrank.catalogue import default_decompositions
from onnx_lowrank.latency.table import CACHE_VARIABLE

CLOSED_FORM = ("--passes", "svd,svd_input,spatial_svd,spatial_svd_reversed,tucker2")
BLOCKS = ("--passes", ",".join([*default_decompositions(), "block_term{restarts=0,sweeps=12}"]))
MORE = ("--passes", ",".join([*default_decompositions(), "cp_spatial", "block_term", "grouped_svd", "tensor_train"]))
KEYS = ("model", "method", "goal")
METHODS = {
    "calibrated": (),
    "calibrated_closed": CLOSED_FORM,
    "calibrated_blocks": BLOCKS,
    "calibrated_more": MORE,
    "data_free": (),
    "energy": ("--allocator", "energy", *CLOSED_FORM),
    "minimax": ("--allocator", "minimax", *CLOSED_FORM),
}
"""Name in the tables -> options; `calibrated` ones are given the calibration data.

The rules of the literature, and what they are compared with, have the formats that follow from singular values.
`calibrated_more` adds to the default formats those by name that came near the front on HED (`benchmarks.formats`);
`calibrated_blocks` adds only block terms, fitted in fewer sweeps from one start.
"""


@dataclass(frozen=True)
class Case:
    """One row of a table.

    Attributes:
        model: What is optimized.
        method: A key of METHODS.
        goal: Option and value: `("--keep-macs", "0.5")`.
        options: All further options of `optimize`.
        shapes: Shapes to time with; those of the zoo by default.
        metric: Also measured by the command itself, on the evaluation data; empty for none.
        calibration: Data instead of the model's `calibration.npz`.
        warm: Measurements to begin with, a folder that is copied; the user's own by default, which keeps what is new.
        keys: Columns that tell this row from others of the same method and goal, e.g. the number of samples.
    """

    model: ZooModel
    method: str
    goal: tuple[str, str]
    options: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    metric: str = ""
    calibration: Path | None = None
    warm: Path | None = None
    keys: dict[str, Scalar] = field(default_factory=dict[str, Scalar])

    @property
    def columns(self) -> dict[str, Scalar]:
        """The values of KEYS."""
        goal = " ".join(self.goal).removeprefix("--")
        return {"model": self.model.name, "method": self.method, "goal": goal}

    def arguments(self, original: Path) -> list[str]:
        """The words behind `optimize MODEL -o OUT`."""
        words = [word for shape in self.shapes or self.model.inputs for word in ("--shape", shape)]
        words += [*self.goal, *self.options, *METHODS[self.method]]
        if self.method.startswith("calibrated"):
            words += ["--calibration", str(self.calibration or original.with_name("calibration.npz"))]
        if self.metric:
            words += ["--eval", str(original.with_name("evaluation.npz")), "--metric", self.metric]
        return words


def measure(case: Case, runs: Path | None = None) -> dict[str, Scalar]:
    """Optimize and evaluate; one row.

    Args:
        case: What to do.
        runs: Folder that keeps the written model and its report, in a folder of its own; None keeps neither.
    """
    cache = default_cache()
    original = case.model.build(cache)
    row: dict[str, Scalar] = {**case.columns, **case.keys}
    name = "_".join(map(str, row.values())).replace(" ", "_")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if runs is None else runs / name
        folder.mkdir(parents=True, exist_ok=True)
        variables: dict[str, str] = {}
        if case.warm is not None:
            own = shutil.copytree(case.warm, Path(temporary) / "cache")
            variables[CACHE_VARIABLE] = str(own)
        run = command.optimize(original, folder / "out.onnx", case.arguments(original), variables)
        row |= {"options": " ".join(case.options), **run.figures()}
        if run.written:
            row |= task(case.model, run.out) | _told(run)
    return row | run.costs()


def record(
    name: str, cases: Iterable[Case], columns: Sequence[str], runs: Path | None = None, folder: Path = results.FOLDER
) -> int:
    """Measure every case, write `<folder>/<name>.json` after each, and print the table.

    A case that leaves no model is printed, and does not replace what is recorded.

    Returns:
        The exit code: 1 if a case left no model.
    """
    rows: list[dict[str, Scalar]] = []
    for case in cases:
        row = measure(case, runs)
        if "error" not in row:
            results.put(name, row, (*KEYS, *case.keys), folder)
        rows.append(row)
        print("  ".join(f"{key} {row[key]}" for key in ("model", "method", "goal", *columns) if key in row), flush=True)
    print(results.table(rows, ["model", "method", "goal", *columns]))
    return int(any("error" in row for row in rows))


def task(model: ZooModel, candidate: Path) -> dict[str, Scalar]:
    """The task metrics, measured here on the whole of the evaluation data, and how far the outputs are."""
    found = evaluate(model, default_cache(), candidate)
    row: dict[str, Scalar] = {}
    for name, metric in found.metrics.items():
        row |= {
            name: round(metric.value, 5),
            f"{name}_original": round(metric.original, 5),
            f"{name}_drop": round(metric.drop, 5),
            f"{name}_drop_ci95": span(metric.drop_ci95, 4),
            f"{name}_samples": metric.samples,
        }
        if metric.sources != metric.samples:
            row[f"{name}_sources"] = metric.sources
    fidelity = found.fidelity
    low, high = fidelity["relative_error_low"], fidelity["relative_error_high"]
    return {
        **row,
        "evaluation_error": float(f"{fidelity['relative_error']:.4g}"),
        "evaluation_error_ci95": f"{low:.4g} to {high:.4g}",
        "evaluation_seconds": round(found.seconds, 1),
    }


def _told(run: command.Run) -> dict[str, Scalar]:
    """What the report itself says about the goal and, with --eval, about the task."""
    row: dict[str, Scalar] = {"goal_reason": str(run.report["goal"]["reason"])}
    accuracy = run.report["accuracy"]
    if accuracy:
        row |= {"reported_before": accuracy["before"], "reported_after": accuracy["after"]}
        row |= {"reported_change_ci95": span(accuracy["ci95"], 4), "reported_samples": accuracy["samples"]}
    return row
