"""Every format on five networks at the same budgets: error, task metric, size and measured speed.

    python -m benchmarks.formats [embedded hed ...] [--formats svd cp ...] [--together] [--limit 3600]
        [--samples 64 | --data-free]

The default formats of a network are one `onnx-lowrank compare` with the calibration data and refit (or without samples:
every network of a large model takes minutes to refit), in a process of its own; every other format is another one. Both
budgets come from one process. Rows go to `formats.json` (whole networks, each then evaluated on its task) and
`formats_layers.json` (the best of a format for a layer) in `benchmarks/results` as they come; what is recorded with the
same options is not run again, so that an interrupted run goes on where it was (`tree` says of which commit a row is;
`--again` measures anew). A process that takes longer than the limit is ended, and recorded as such until the limit is
larger. `--together` mixes all formats, too, in one process: the longest.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import command
from benchmarks.accuracy.experiment import task
from benchmarks.accuracy.sweeps import SIXTY_FOUR_TOKENS
from benchmarks.command import LATE, span
from benchmarks.fashion import EMBEDDED, NETS
from benchmarks.zoo import results
from benchmarks.zoo.cache import default_cache
from benchmarks.zoo.model import ZooModel
from benchmarks.zoo.models import all_models
from benchmarks.zoo.results import FOLDER, Row, Scalar
from onnx_lowrank.catalogue import all_decompositions, default_decompositions
from onnx_lowrank.settings import Settings

NETWORKS = (EMBEDDED, "hed", "ocr_det", "minilm", "crepe_full")
SHAPES = {"minilm": SIXTY_FOUR_TOKENS}
GOALS = ("keep-macs 0.5", "speedup 2")
LIMIT_S = 3600.0
KEYS = ("model", "formats", "goal", "options")
LAYER_KEYS = (*KEYS, "layer")
COLUMNS = (*KEYS[:3], "reached", "relative_error", "params_kept", "macs_kept", "speedup", "ci95", "reason")


@dataclass(frozen=True)
class Case:
    """One process.

    Attributes:
        model: What is compared on.
        formats: What is compared.
        name: Of the row of all its formats together.
        options: All further options of `compare`.
        data_free: Whether nothing is calibrated.
    """

    model: ZooModel
    formats: tuple[str, ...]
    name: str
    options: tuple[str, ...]
    data_free: bool = False

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of the rows the process gives."""
        return (*self.formats, self.name) if len(self.formats) > 1 else self.formats

    def arguments(self, original: Path) -> list[str]:
        """The words behind `compare MODEL --models FOLDER --json`."""
        words = [word for shape in SHAPES.get(self.model.name, self.model.inputs) for word in ("--shape", shape)]
        if not self.data_free:
            words += ["--calibration", str(original.with_name("calibration.npz"))]
        return [*words, "--passes", ",".join(self.formats), *self.options]


def cases(
    names: Iterable[str],
    formats: Sequence[str],
    options: Sequence[str],
    *,
    together: bool = False,
    data_free: bool = False,
) -> Iterator[Case]:
    """The default formats, then every other one; at last all of them.

    Args:
        names: Of NETWORKS.
        formats: Names of decompositions.
        options: All further options of `compare`.
        together: Whether all formats are mixed, too.
        data_free: Whether nothing is calibrated.
    """
    default = tuple(name for name in formats if name in default_decompositions())
    for name in names:
        model = NETS[name] if name in NETS else all_models()[name]
        if default:
            yield Case(model, default, "default", tuple(options), data_free)
        for other in (other for other in formats if other not in default):
            yield Case(model, (other,), other, tuple(options), data_free)
        if together:
            yield Case(model, tuple(formats), "all", tuple(options), data_free)


def run(case: Case, limit_s: float, *, again: bool = False, folder: Path = FOLDER) -> None:
    """Compare and evaluate, unless all rows of a case are recorded; record the rows."""
    common: dict[str, Scalar] = {"options": " ".join(case.options)}
    wanted = {(case.model.name, name, goal, common["options"]) for name in case.rows for goal in GOALS}
    missing = wanted if again else wanted - _done(results.recorded("formats", folder), limit_s)
    if not missing:
        return
    original = case.model.build(default_cache())
    with tempfile.TemporaryDirectory() as models:
        done = command.compare(original, Path(models), case.arguments(original), limit_s)
        took: dict[str, Scalar] = {"process_seconds": done.seconds, "limit_seconds": limit_s}
        for keys in sorted(missing) if done.error else ():
            row = {**dict(zip(KEYS, keys, strict=True)), "reached": False, "reason": done.error, **took}
            results.put("formats", row, KEYS, folder)
        for network in done.found.get("networks", ()):
            row = _network(case.model, done.found, network) | common | took
            results.put("formats", row, KEYS, folder)
            print("  ".join(f"{key} {row[key]}" for key in COLUMNS if key in row), flush=True)
        for row in _layers(case.model, done.found):
            results.put("formats_layers", row | common, LAYER_KEYS, folder)
    if done.error:
        print(f"{case.model.name} {case.rows[-1]}: {done.error}", flush=True)


def _done(rows: Iterable[Row], limit_s: float) -> set[tuple[Scalar, ...]]:
    """Keys of the rows that need not be run again; those that took too long may end within a larger limit."""

    def late(row: Row) -> bool:
        return str(row.get("reason")).startswith(LATE) and float(row.get("limit_seconds") or 0) < limit_s

    return {tuple(row.get(key) for key in KEYS) for row in rows if not late(row)}


def _network(model: ZooModel, found: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Scalar]:
    """A network and what it does on the task."""
    result: dict[str, Scalar] = {
        "model": model.name,
        "formats": row["name"],
        "goal": row["budget"],
        "reached": row["reached"],
        "reason": row["reason"],
        "row_seconds": row["seconds"],
    }
    if row["file"] is None:
        return result
    return {
        **result,
        "relative_error": float(f"{row['relative_error']:.4g}"),
        "params_kept": round(row["params"] / found["params"], 4),
        "macs_kept": round(row["macs"] / found["macs"], 4),
        "after_ms": round(row["ms"], 4),
        "speedup": round(row["speedup"], 3),
        "ci95": span(row["ci95"]),
        "low_rank_speedup": round(row["low_rank_speedup"], 3),
        "low_rank_ci95": span(row["low_rank_ci95"]),
        "disturbed": row["disturbed"],
        "layers": sum(row["used"].values()),
        "used": ", ".join(f"{name} {count}" for name, count in sorted(row["used"].items())),
        "data": found["data"],
        **task(model, Path(row["file"])),
    }


def _layers(model: ZooModel, found: Mapping[str, Any]) -> Iterator[dict[str, Scalar]]:
    """The best of each format for each layer."""
    for layer in found.get("layers", ()):
        for row in (row for row in layer["contenders"] if row["rank"] and row["of_layer"] is not None):
            yield {
                "model": model.name,
                "formats": row["format"],
                "goal": row["budget"],
                "layer": layer["name"],
                "shape": layer["shape"],
                "layer_ms": float(f"{layer['ms']:.4g}"),
                "rank": "x".join(map(str, row["rank"])),
                "error": float(f"{row['error']:.4g}"),
                "error_of": layer["metric"],
                "params_kept": round(row["params"] / layer["params"], 4),
                "macs_kept": round(row["macs"] / layer["macs"], 4),
                "of_layer": round(row["of_layer"], 4),
                "ci95": span(row["ci95"]),
                "beyond": row["beyond"],
            }


def main() -> int:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NETWORK", help=f"of {', '.join(NETWORKS)}; all by default")
    parser.add_argument("--formats", nargs="+", choices=all_decompositions(), metavar="FORMAT", help="all by default")
    parser.add_argument("--together", action="store_true", help="mix all formats, too")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds of one process (%(default)s)")
    parser.add_argument("--again", action="store_true", help="run what is recorded, too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--samples", type=int, default=Settings.samples, help="to calibrate with, at most (%(default)s)"
    )
    parser.add_argument(
        "--data-free", action="store_true", help="without samples: a quarter of an hour for a large net"
    )
    parser.add_argument("--results", type=Path, default=FOLDER)
    asked = parser.parse_args()
    options = [word for goal in GOALS for word in f"--{goal}".split()]
    options += ["--threads", str(asked.threads)]
    options += [] if asked.data_free else ["--samples", str(asked.samples)]
    formats = tuple(asked.formats or all_decompositions())
    several = {"together": asked.together, "data_free": asked.data_free}
    for case in cases(asked.names or NETWORKS, formats, options, **several):
        run(case, asked.limit, again=asked.again, folder=asked.results)
    print(results.table(results.recorded("formats", asked.results), COLUMNS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
