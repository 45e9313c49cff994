"""The process that `memory` starts: forks one that loads a model, runs it, and tells how far its memory rose."""

from __future__ import annotations

import os
import pickle
import re
import signal
import sys
from pathlib import Path
from typing import BinaryIO

from onnx_lowrank.errors import LowRankError
from onnx_lowrank.profile.memory import FAILED, PEAK
from onnx_lowrank.providers import provider_reason
from onnx_lowrank.runtime import open_session
from onnx_lowrank.signature import Feeds
from onnx_lowrank.target import Target

_RUNS = 2  # the first one plans the arena, the second one has it
_LIMIT_S = 600


def risen_bytes(path: Path, target: Target, level: str, feeds: Feeds) -> int:
    """Peak of resident memory while `path` is loaded and run, over the memory held before.

    Raises:
        OSError: where the peak cannot be read and reset.
        InputError, ProviderError: as for `open_session` and `Session.run`.
    """
    provider_reason(target.provider)  # runs a model of one node: what every session needs is there
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak_bytes()
    session = open_session(path, target, level)
    for _ in range(_RUNS):
        session.run(feeds)
    return _peak_bytes() - before


def serve(requests: BinaryIO) -> None:
    """Answer every pickled request by one line, until there are no more. No session is ever opened in this process."""
    while True:
        try:
            request = pickle.load(requests)  # noqa: S301 - from the process that started this one
        except EOFError:
            return
        child = os.fork()
        if child == 0:
            _answer(request)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code:
            _say(f"{FAILED}the process that measures it ended with {code}")


def _answer(request: tuple[Path, Target, str, Feeds]) -> None:
    """Measure and end this process."""
    signal.alarm(_LIMIT_S)
    code = 1
    try:
        _say(f"{PEAK}{risen_bytes(*request)}")
        code = 0
    except (LowRankError, OSError) as error:
        _say(f"{FAILED}{error}")
        code = 0
    finally:
        os._exit(code)


def _say(line: str) -> None:
    sys.stdout.write(f"{' '.join(line.split())}\n")
    sys.stdout.flush()


def _peak_bytes() -> int:
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError("/proc/self/status does not tell VmHWM")
    return int(found[1]) << 10


if __name__ == "__main__":
    serve(sys.stdin.buffer)
