"""How much memory a session takes: the peak of a process of its own, over what that process held before.

On Linux only, where a process can read and reset the peak of its resident memory (VmHWM in /proc/self/status).
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from onnx_lowrank.signature import Feeds
from onnx_lowrank.target import Target

HOW = (
    "peak of resident host memory (VmHWM) while a process of its own loads the model and runs it, "
    "over that process before, onnxruntime loaded and warm"
)
PEAK, FAILED = "peak ", "failed "
_SERVER = "onnx_lowrank.profile.memory_server"


@dataclass(frozen=True)
class Memory:
    """Bytes, or None and the reason why they were not measured."""

    peak_bytes: int | None
    reason: str = ""


class MemoryMeter:
    """Measures sessions, each in a process of its own; these are forked from one that has loaded onnxruntime."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def peak(self, path: Path, target: Target, level: str, feeds: Feeds) -> Memory:
        """Peak host memory of loading a model and running it on `feeds`, which are not counted themselves."""
        if sys.platform != "linux":
            return Memory(None, f"only on Linux, not on {sys.platform}")
        try:
            answer = self._asked(pickle.dumps((path.absolute(), target, level, dict(feeds))))
        except OSError as error:
            answer = f"{FAILED}{error}"
        if answer.startswith(PEAK):
            return Memory(int(answer.removeprefix(PEAK)))
        self._stop()
        return Memory(None, answer.removeprefix(FAILED) or "the process that measures it died")

    def _asked(self, request: bytes) -> str:
        """The server's answer, one line; empty where it died."""
        if self._server is None:
            # It finds modules where this process does, installed or not.
            path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
            self._server = subprocess.Popen(  # noqa: S603 - this interpreter, fixed words
                [sys.executable, "-P", "-m", _SERVER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": path},
            )
        if self._server.stdin is None or self._server.stdout is None:
            return ""
        self._server.stdin.write(request)
        self._server.stdin.flush()
        lines = (line.decode(errors="replace").strip() for line in self._server.stdout)
        return next((line for line in lines if line.startswith((PEAK, FAILED))), "")  # providers may print, too

    def _stop(self) -> None:
        if self._server is not None:
            self._server.kill()
            self._server.communicate()
            self._server = None
