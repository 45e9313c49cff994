"""A model above 2.2 GB through `optimize`: `python -m benchmarks.large [FOLDER] [--record] [-- options of optimize]`.

Writes the model of `big_model`, runs the command in a process of its own, and prints one row: seconds, peak memory of
that process (it starts no others that hold data), layers rewritten, and whether the weights of all other layers are the
original's, byte for byte. The files are removed unless a folder is named.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import onnx
from onnx import TensorProto

from benchmarks.big_model import write_big_model
from benchmarks.zoo.results import Scalar, write
from onnx_lowrank.graph.external import raw_bytes

GOAL = ("--speedup", "1.2", "--threads", "2", "--time-limit", "600")
RUSAGE_UNIT = 1 if sys.platform == "darwin" else 1024


def run_large(folder: Path, options: tuple[str, ...] = GOAL, depth: int = 520, size: int = 1056) -> dict[str, Scalar]:
    """Write the model into `folder`, optimize it there, and look at what came out.

    Args:
        folder: Receives big.onnx, out.onnx, their data, and report.json.
        options: Goal and target.
        depth: Number of MatMul.
        size: Rows and columns of each weight.

    Raises:
        RuntimeError: if the command fails in any other way than by missing its goal.
    """
    source, out = folder / "big.onnx", folder / "out.onnx"
    written = write_big_model(source, depth, size)
    command = [sys.executable, "-m", "onnx_lowrank", "optimize", str(source), "-o", str(out), "--report", str(folder)]
    start = time.perf_counter()
    process = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if process.returncode not in {0, 3}:
        raise RuntimeError(f"exit code {process.returncode}: {said}")
    onnx.checker.check_model(str(out))
    report = json.loads((folder / "report.json").read_text())
    kept, equal = kept_weights(source, out)
    return {
        "options": " ".join(options),
        "gigabytes": round(written / 1e9, 2),
        "matmuls": depth,
        "exit_code": process.returncode,
        "seconds": round(seconds, 1),
        "peak_gigabytes": round(usage.ru_maxrss * RUSAGE_UNIT / 1e9, 2),
        "factorized": sum(row["decision"] == "factorized" for row in report["layers"]),
        "kept": kept,
        "kept_equal": equal,
        "speedup": round(report["latency"]["speedup"], 3),
        "relative_error": float(f"{report['fidelity']['relative_error']:.3g}"),
        "gigabytes_after": round((out.stat().st_size + out.with_name("out.onnx.data").stat().st_size) / 1e9, 2),
    }


def kept_weights(source: Path, out: Path) -> tuple[int, int]:
    """How many external tensors both files name alike, and how many of these hold the same bytes."""
    before, after = _external(source), _external(out)
    shared = before.keys() & after.keys()
    equal = sum(
        raw_bytes(before[name], source.parent).tobytes() == raw_bytes(after[name], out.parent).tobytes()
        for name in shared
    )
    return len(shared), equal


def _external(path: Path) -> dict[str, TensorProto]:
    model = onnx.load(path, load_external_data=False)
    return {tensor.name: tensor for tensor in model.graph.initializer if tensor.external_data}


def main() -> None:
    """Run it, print the row, and record it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/big_model.json")
    parser.add_argument("options", nargs="*", help="goal and target, after --")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        row = run_large(arguments.folder or Path(temporary), tuple(arguments.options) or GOAL)
    print(json.dumps(row, indent=1))
    if arguments.record:
        write("big_model", [row])


if __name__ == "__main__":
    main()
