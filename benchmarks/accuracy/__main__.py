"""What calibration costs and saves.

    python -m benchmarks.accuracy fashion [embedded resnet20 vgg] --values 0.5 0.4 0.3 0.2
    python -m benchmarks.accuracy hed --values 2.9 3.9 4.9 6
    python -m benchmarks.accuracy hed --values 5.3 --methods calibrated_closed calibrated_blocks --samples 64
    python -m benchmarks.accuracy ocr_rec | efficientnet | minilm | minilm_fast [--methods calibrated data_free]
    python -m benchmarks.accuracy samples [embedded minilm hed] [--samples 32 128 512 2048] [--draws 1]
    python -m benchmarks.accuracy time [hed minilm]

Every row is `onnx-lowrank optimize` in a process of its own, then the written file against the original on the task.
Rows go to `benchmarks/results/accuracy_<experiment>.json` as they come and replace those of the same case, so that an
interrupted sweep can go on. `time` wants a warm latency table: run the sweeps first. The evaluation runs on as many
threads as ONNX_LOWRANK_ZOO_THREADS says, one by default.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.accuracy import samples, sweeps
from benchmarks.accuracy.experiment import METHODS, Case, record
from benchmarks.accuracy.sweeps import Sweep
from benchmarks.fashion import NETS
from benchmarks.zoo.results import FOLDER

PHASES = ("phase_moments", "phase_sensitivity", "phase_refit", "peak_rss_mib", "seconds", "error")
TIMED = {"hed": (3.9, 64), "minilm": (0.5, 512)}
"""Model -> goal, and samples calibrated on."""


def main(words: Sequence[str] | None = None) -> int:
    """Run one experiment; returns the exit code."""
    asked = _parser().parse_args(words)
    match asked.experiment:
        case "fashion":
            return _sweep("fashion", sweeps.fashion(asked.names or list(NETS)), asked)
        case "samples":
            return _samples(asked)
        case "time":
            return record("accuracy_time", _timed(asked), PHASES, asked.runs, asked.results)
        case name:
            return _sweep(name, sweeps.zoo(name), asked)


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.accuracy", description=__doc__, formatter_class=formatter)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--threads", type=int, default=1, help="of the target")
    common.add_argument("--runs", type=Path, help="folder that keeps every written model and its report")
    common.add_argument("--results", type=Path, default=FOLDER, help="folder of the result files (%(default)s)")
    budgets = argparse.ArgumentParser(add_help=False)
    budgets.add_argument("--values", type=float, nargs="+", help="of the goal; those of the sweep by default")
    budgets.add_argument("--methods", nargs="+", choices=METHODS, help="those of the sweep by default")
    budgets.add_argument("--samples", type=int, help="to calibrate on; as many as there are by default")
    experiments = parser.add_subparsers(dest="experiment", required=True)
    on_fashion = experiments.add_parser("fashion", parents=[common, budgets], help="networks on Fashion-MNIST")
    on_fashion.add_argument("names", nargs="*", metavar="NET", help=f"of {', '.join(NETS)}; all by default")
    for name in sweeps.ZOO:
        experiments.add_parser(name, parents=[common, budgets], help="of the zoo")
    sizes = experiments.add_parser("samples", parents=[common], help="how many samples calibration needs")
    sizes.add_argument("names", nargs="*", metavar="NET", help="of embedded, minilm, hed; the first two by default")
    sizes.add_argument("--samples", type=int, nargs="+", help="sizes; those that the data reach by default")
    sizes.add_argument("--draws", type=int, default=1, help="disjoint draws of each size")
    timed = experiments.add_parser("time", parents=[common], help="seconds per phase and peak memory")
    timed.add_argument("names", nargs="*", metavar="NET", help=f"of {', '.join(TIMED)}; all by default")
    return parser


def _sweep(name: str, sweep: Sweep, asked: argparse.Namespace) -> int:
    if asked.samples:
        sweep = replace(sweep, options=(*sweep.options, "--samples", str(asked.samples)))
    cases = sweep.cases(asked.values or sweep.values, asked.methods or sweep.methods, asked.threads)
    return record(f"accuracy_{name}", cases, sweep.columns, asked.runs, asked.results)


def _samples(asked: argparse.Namespace) -> int:
    known = samples.settings()
    code = 0
    for setting in (known[name] for name in asked.names or ("embedded", "minilm")):
        with tempfile.TemporaryDirectory() as folder:
            cases = samples.cases(setting, asked.samples or setting.samples, asked.draws, asked.threads, Path(folder))
            columns = (*samples.COLUMNS, setting.metric, "error")
            code |= record("accuracy_samples", cases, columns, asked.runs, asked.results)
    return code


def _timed(asked: argparse.Namespace) -> list[Case]:
    """The longest sweeps of the zoo, each at one budget."""
    found: list[Case] = []
    for name in asked.names or TIMED:
        value, samples = TIMED[name]
        sweep = sweeps.zoo(name)
        sweep = replace(sweep, options=(*sweep.options, "--samples", str(samples)))
        found += sweep.cases([value], ["calibrated"], asked.threads)
    return found


if __name__ == "__main__":
    sys.exit(main())
