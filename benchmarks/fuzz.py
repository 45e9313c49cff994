"""Broken models through the whole command: `python -m benchmarks.fuzz --count 10000 --seed 1`.

Byte flips, truncations, splices and wrong fields of small valid models go through `optimize --keep-macs 0.5` in a warm
worker that is killed after ten seconds of processor time. How they ended is recorded in `benchmarks/results/fuzz.json`;
files that ended in any other way than with exit code 2 and no file, or 0 or 3 and a valid one, are kept in the folder
named with --keep.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from benchmarks.zoo import results
from onnx_lowrank.latency.table import CACHE_VARIABLE

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))  # the tests run some of the same

from mutations import mutants
from survivors import FINE, optimize, survive

logger = logging.getLogger(__name__)


def fuzz(count: int, seed: int, keep: Path | None) -> Counter[str]:
    """How often each end was met; anything but an honest exit code is logged."""
    ends: Counter[str] = Counter()
    # Two equal streams instead of a list: one to be worked on, one to keep the file from when it goes wrong.
    for index, (end, case) in enumerate(
        zip(survive(mutants(seed, count), optimize), mutants(seed, count), strict=True)
    ):
        ends[end] += 1
        if end not in FINE:
            logger.error("case %d of seed %d: %s", index, seed, end)
            if keep is not None:
                (keep / f"{seed}-{index}.onnx").write_bytes(case)
        if (index + 1) % 500 == 0:
            logger.info("%d of %d: %s", index + 1, count, dict(ends))
    return ends


def main() -> int:
    """Run and record; 1 if any file ended in a traceback, a crash, a hang, or with exit code 4."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="folder for the files that went wrong")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as cache:
        os.environ[CACHE_VARIABLE] = cache
        ends = fuzz(options.count, options.seed, options.keep)
    seconds = round(time.monotonic() - start)
    command = f"python -m benchmarks.fuzz --count {options.count} --seed {options.seed}"
    rows = [{"end": end, "files": files, "command": command, "seconds": seconds} for end, files in ends.most_common()]
    logger.info("written to %s", results.write("fuzz", rows))
    return 0 if ends.keys() <= FINE else 1


if __name__ == "__main__":
    sys.exit(main())
