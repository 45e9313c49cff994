"""Times ONNX files in turns, with nothing of onnx-lowrank: the witness of its figures.

    python benchmarks/independent.py ORIGINAL.onnx@all A.onnx@extended ... --shape x=1x3x256x256 [--threads 1]

Needs onnxruntime and numpy. Every round takes the files in a new order and runs each again and again for 20 ms, at
least once; the mean by the wall clock counts. Prints JSON: per file the median over the rounds in milliseconds and how
many times as fast as the first file it is: median of the ratios within a round.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable

import numpy as np
import onnxruntime as ort

LEVELS = {"all": "ORT_ENABLE_ALL", "extended": "ORT_ENABLE_EXTENDED", "basic": "ORT_ENABLE_BASIC"}
ROUNDS = 30
SAMPLE_S = 0.02
KINDS = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32}


def session(word: str, threads: int) -> ort.InferenceSession:
    """A session of FILE@LEVEL."""
    path, _, level = word.rpartition("@")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, LEVELS[level])
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def bound(session: ort.InferenceSession, feeds: dict[str, np.ndarray]) -> Callable[[], None]:
    """A call of the session with inputs and outputs bound, so that Python copies nothing; run once."""
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_cpu_input(name, array)
    for output in session.get_outputs():
        binding.bind_output(output.name)
    session.run_with_iobinding(binding)
    return lambda: session.run_with_iobinding(binding)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE@LEVEL")
    parser.add_argument("--shape", action="append", required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60.0, help="to go on for, at least 30 rounds")
    asked = parser.parse_args()
    sizes = {name: [int(n) for n in size.split("x")] for name, _, size in (s.partition("=") for s in asked.shape)}
    sessions = [session(word, asked.threads) for word in asked.files]
    rng = np.random.default_rng(0)
    feeds = {
        i.name: (np.ones if "int" in i.type else rng.standard_normal)(sizes[i.name]).astype(KINDS[i.type])
        for i in sessions[0].get_inputs()
    }
    order, times = list(range(len(sessions))), [list[float]() for _ in sessions]
    runs = [bound(each, feeds) for each in sessions]
    until = time.perf_counter() + asked.seconds
    while len(times[0]) < ROUNDS or time.perf_counter() < until:
        random.shuffle(order)
        for i in order:
            count, started = 0, time.perf_counter()
            while not count or time.perf_counter() - started < SAMPLE_S:
                runs[i]()
                count += 1
            times[i].append((time.perf_counter() - started) / count)
    ratios = [statistics.median(a / b for a, b in zip(times[0], mine, strict=True)) for mine in times]
    medians = [1e3 * statistics.median(mine) for mine in times]
    print(json.dumps({"ms": [round(ms, 3) for ms in medians], "speedup": [round(ratio, 3) for ratio in ratios]}))


if __name__ == "__main__":
    main()
