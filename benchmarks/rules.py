"""Every rank rule on one network at the same budgets: change of the metric, size, speed, and the time it takes.

    python -m benchmarks.rules [--rules knapsack beam ...] [--net embedded] [--keep-macs 0.5 0.3] [--speedup 2]

Every row is `onnx-lowrank optimize` with the calibration data and refit, in a process of its own, then the written file
on the 10,000 labelled test images; rows go to `benchmarks/results/rules.json` as they come, and what is recorded is not
run again without `--again`. The default is run once before, in a cache of its own, and every row begins with a copy of
that: no rule pays for what all need, and none is given what another run of it measured. `seconds` is the whole command,
`phase_search` the rule with the models it was measured by.

ALDS chooses the number of slices of every layer, and `grouped_svd`, which has them, is not among the default formats.
Its rows are on its own formats (`svd`, `grouped_svd`) and on the default ones with `grouped_svd`; the knapsack's are on
both, too.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path

from benchmarks import command
from benchmarks.accuracy.experiment import KEYS, Case, record
from benchmarks.fashion import EMBEDDED, NETS
from benchmarks.zoo import results
from benchmarks.zoo.cache import default_cache
from benchmarks.zoo.results import FOLDER, Scalar
from onnx_lowrank.allocators import ALLOCATORS
from onnx_lowrank.catalogue import default_decompositions
from onnx_lowrank.latency.table import CACHE_VARIABLE

RULES = tuple(name for name in ALLOCATORS if name != "full_rank")
DEFAULT, SLICED, EVERY = "default", "svd,grouped_svd", "default,grouped_svd"
"""Formats in the tables; `cases` says what `--passes` they are."""
RESULT = ("macs_kept", "speedup", "ci95", "top1", "top1_drop", "top1_drop_ci95", "seconds", "phase_search")
COLUMNS = ("rule", "formats", *RESULT)
Goal = tuple[str, float]


def formats_of(rule: str) -> tuple[str, ...]:
    """The sets of formats a rule is tried on."""
    return {"knapsack": (DEFAULT, SLICED, EVERY), "alds": (SLICED, EVERY), "alds_authors": (SLICED, EVERY)}.get(
        rule, (DEFAULT,)
    )


def cases(net: str, goals: Sequence[Goal], rules: Sequence[str], threads: int, warm: Path | None) -> Iterator[Case]:
    """Every rule at every goal.

    Args:
        net: A key of `benchmarks.fashion.NETS`.
        goals: Options of `optimize` and their values.
        rules: Names of allocators.
        threads: To time with.
        warm: Measurements that each begins with.
    """
    passes = {DEFAULT: (), SLICED: ("--passes", SLICED)}
    passes[EVERY] = ("--passes", ",".join([*default_decompositions(), "grouped_svd"]))
    for (option, value), rule in product(goals, rules):
        for formats in formats_of(rule):
            options = ("--threads", str(threads), "--allocator", rule, *passes[formats])
            keys: dict[str, Scalar] = {"rule": rule, "formats": formats, "threads": threads}
            yield Case(NETS[net], "calibrated", (option, f"{value:g}"), options, warm=warm, keys=keys)


def missing(found: Iterable[Case], folder: Path) -> list[Case]:
    """Those that have no row yet."""
    keys = (*KEYS, "rule", "formats", "threads")
    recorded = {tuple(row.get(key) for key in keys) for row in results.recorded("rules", folder)}
    return [case for case in found if tuple({**case.columns, **case.keys}[key] for key in keys) not in recorded]


def main() -> int:
    """Measure what is missing, write the results, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", nargs="*", default=RULES, choices=RULES, metavar="RULE")
    parser.add_argument("--net", default=EMBEDDED, choices=NETS)
    parser.add_argument("--keep-macs", nargs="*", type=float, default=(0.5, 0.3))
    parser.add_argument("--speedup", nargs="*", type=float, default=(2.0,))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="run what is recorded, too")
    parser.add_argument("--results", type=Path, default=FOLDER)
    asked = parser.parse_args()
    goals = [("--keep-macs", value) for value in asked.keep_macs] + [("--speedup", value) for value in asked.speedup]
    with tempfile.TemporaryDirectory() as folder:
        warm = Path(folder) / "cache"
        wanted = list(cases(asked.net, goals, asked.rules, asked.threads, warm))
        wanted = wanted if asked.again else missing(wanted, asked.results)
        for case in cases(asked.net, goals, ["knapsack"], asked.threads, None) if wanted else ():
            original = case.model.build(default_cache())
            command.optimize(original, Path(folder) / "out.onnx", case.arguments(original), {CACHE_VARIABLE: str(warm)})
        return record("rules", wanted, COLUMNS, folder=asked.results)


if __name__ == "__main__":
    sys.exit(main())
