"""Every rank rule on one network at the same budgets: change of the metric, size, speed, and the time it takes.

    python -m benchmarks.rules [--rules knapsack beam ...] [--net embedded] [--keep-macs 0.5 0.3] [--speedup 2]

Every row is `onnx-lowrank optimize` with the calibration data and refit, in a process of its own, then the written file
on the 10,000 labelled test images; rows go to `benchmarks/results/rules.json` as they come. What is probed and timed is
remembered between runs: the default is run once before and not recorded, so that no rule pays for the others. `seconds`
is the whole command, `phase_search` the rule with the models it was measured by.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.accuracy.experiment import Case, measure, record
from benchmarks.fashion import EMBEDDED, NETS
from benchmarks.zoo.results import FOLDER
from onnx_lowrank.allocators import ALLOCATORS

RULES = tuple(name for name in ALLOCATORS if name != "full_rank")
COLUMNS = ("rule", "macs_kept", "speedup", "ci95", "top1", "top1_drop", "top1_drop_ci95", "seconds", "phase_search")


def cases(net: str, goals: Sequence[tuple[str, float]], rules: Sequence[str], threads: int) -> Iterator[Case]:
    """Every rule at every goal.

    Args:
        net: A key of `benchmarks.fashion.NETS`.
        goals: Options of `optimize` and their values.
        rules: Names of allocators.
        threads: To time with.
    """
    for option, value in goals:
        for rule in rules:
            options = ("--threads", str(threads), "--allocator", rule)
            yield Case(NETS[net], "calibrated", (option, f"{value:g}"), options, keys={"rule": rule})


def main() -> int:
    """Measure, write the results, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", nargs="*", default=RULES, choices=RULES, metavar="RULE")
    parser.add_argument("--net", default=EMBEDDED, choices=NETS)
    parser.add_argument("--keep-macs", nargs="*", type=float, default=(0.5, 0.3))
    parser.add_argument("--speedup", nargs="*", type=float, default=(2.0,))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=FOLDER)
    asked = parser.parse_args()
    goals = [("--keep-macs", value) for value in asked.keep_macs] + [("--speedup", value) for value in asked.speedup]
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(asked.net, goals, ["knapsack"], asked.threads):
            measure(case, Path(folder))
    return record("rules", cases(asked.net, goals, asked.rules, asked.threads), COLUMNS, folder=asked.results)


if __name__ == "__main__":
    sys.exit(main())
