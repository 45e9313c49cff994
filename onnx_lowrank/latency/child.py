"""The parent's end of the measuring process: whatever a provider does to it costs one measurement, not the run."""

from __future__ import annotations

import atexit
import functools
import math
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

from onnx_lowrank.errors import LowRankError, ProviderError
from onnx_lowrank.latency.measure import Until
from onnx_lowrank.latency.messages import Broken, Contest, Finished, Message, Working, receive, send

# Not by -m, which would first run the package's __init__ and with it import the whole tool: 2 s instead of 0.5.
_START = """
import sys, types
package = sys.modules["onnx_lowrank"] = types.ModuleType("onnx_lowrank")
package.__path__ = [sys.argv[1]]
from onnx_lowrank.latency.worker import main
main()
"""
# -P: a module of the same name in the working folder is none of ours.
COMMAND = (sys.executable, "-P", "-c", _START, str(Path(__file__).parents[1]))
PATIENCE_S = 60.0
_START_S = 120.0  # on a machine so busy that importing takes a minute
# Providers that compile a model when it is opened.
_COMPILING = frozenset({"tensorrt", "openvino", "coreml"})
_COMPILE_S = 600.0
_READ_BYTES_PER_S = 10e6
# A round runs each subject for a millisecond, or once; no candidate takes a hundred times as long as its layer.
_TIMES_FIRST = 100.0
_GRACE_S = 5.0
_PAIR = 2  # a layer and one chain: fewer is no comparison
_SIGKILL = 9  # the signal module of Windows has none


class MeasuringError(ProviderError):
    """The measuring process died or hung; `index` is the subject it was opening, None if all were open."""

    def __init__(self, what: str, index: int | None) -> None:
        self.what, self.index = what, index
        self.no_memory = "out of memory" in what
        super().__init__(
            f"models whose measuring process {what}", "a provider that runs them", "try another one, or other options"
        )

    @property
    def reason(self) -> str:
        """As a sentence of the report."""
        return f"the measuring process {self.what}"


class CrowdedError(MeasuringError):
    """Memory ran out while several subjects were open: fewer of them may do."""


class Child:
    """A measuring process: started when it is first asked, and again after it died.

    Args:
        command: Starts a process that speaks `messages`, see `worker`.
        patience_s: Silence after which it counts as hanging; more where a provider compiles, a model has to be read,
            or one run takes long.
    """

    def __init__(self, command: Sequence[str] = COMMAND, patience_s: float = PATIENCE_S) -> None:
        self._command, self._patience_s = tuple(command), patience_s
        self._process: subprocess.Popen[bytes] | None = None
        self._said: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._best = math.inf

    @property
    def pid(self) -> int | None:
        """Of the process, while it lives."""
        return self._process.pid if self._process is not None else None

    def ask(self, contest: Contest) -> Finished:
        """Time the subjects of a contest.

        Raises:
            MeasuringError: if the process died, hung or failed; the next call starts another one.
        """
        with self._lock:
            try:
                found = self._asked(replace(contest, best=self._best))
            except BaseException:  # an interrupted process would go on measuring, and answer the wrong question
                self._kill()
                raise
            self._best = min(self._best, found.best)  # a process that is started under a load would know no better
            if _failed_on_device(contest, found) is not None:  # it may leave nothing usable behind
                self._kill()
            return found

    def contest(self, contest: Contest, *, divisible: bool = False) -> Finished:
        """`ask`, without the subjects that the process dies of; they are among the refused.

        If it dies of the first subject, or of no single one, all are refused. An error on a device may leave nothing
        usable behind in the process: what failed first is left out then, and all others are asked for anew.

        Args:
            contest: What to time.
            divisible: The caller can do with fewer at once.

        Raises:
            CrowdedError: if they are divisible, more than two, and it ran out of memory.
        """
        refused: dict[int, LowRankError] = {}
        left = list(range(len(contest.subjects)))
        while left:
            part = replace(contest, subjects=[contest.subjects[index] for index in left])
            try:
                found = self.ask(part)
            except MeasuringError as error:
                if divisible and error.no_memory and len(left) > _PAIR:
                    raise CrowdedError(error.what, None) from error
                culprits = {error.index: error} if error.index is not None else self._culprits(part)
                if 0 in culprits or not culprits:
                    return Finished(None, refused | dict.fromkeys(left, culprits.get(0, error)))
                refused |= {left[index]: error for index, error in culprits.items()}
                left = [index for place, index in enumerate(left) if place not in culprits]
                continue
            failed = _failed_on_device(part, found)
            if failed is None:
                return Finished(found.paired, refused | {left[i]: error for i, error in found.refused.items()})
            refused[left.pop(failed)] = found.refused[failed]
        return Finished(None, refused)

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._kill()

    def _culprits(self, contest: Contest) -> dict[int, MeasuringError]:
        """The subjects it dies of, tried one by one beside the first."""
        once = Until(contest.until.rounds, 0.0, sample_s=contest.until.sample_s)
        first, *others = contest.subjects
        found: dict[int, MeasuringError] = {}
        for index, subjects in enumerate([[first], *([first, other] for other in others)]):
            try:
                self.ask(replace(contest, subjects=subjects, until=once))
            except MeasuringError as error:
                found[index] = error
                if index == 0:
                    break
        return found

    def _asked(self, contest: Contest) -> Finished:
        if self._process is None or self._process.poll() is not None:
            self._process = self._started()
            self._heard(_START_S, None)
        assert self._process.stdin is not None  # noqa: S101 - a pipe was asked for
        try:
            send(self._process.stdin, contest)
        except OSError:
            raise MeasuringError(self._end(), None) from None
        doing = Working()
        while True:
            match self._heard(self._patience(contest, doing), doing.index):
                case Working() as doing:
                    continue
                case Finished() as found:
                    return found
                case Broken() as broken:
                    raise MeasuringError(broken.reason, broken.index)
                case _:
                    raise MeasuringError("said what it should not", doing.index)

    def _heard(self, patience_s: float, index: int | None) -> Message:
        """The next message; `index` is what the process is about to open."""
        try:
            said = self._said.get(timeout=patience_s)
        except queue.Empty:
            raise MeasuringError(f"did not answer within {patience_s:.0f} s", index) from None
        if said is None:
            raise MeasuringError(self._end(), index)
        return said

    def _patience(self, contest: Contest, doing: Working) -> float:
        compiling = any(subject.target.provider in _COMPILING for subject in contest.subjects)
        extra = _COMPILE_S if compiling and doing.index is not None else 0.0
        sizes = [s.model.stat().st_size if isinstance(s.model, Path) else len(s.model) for s in contest.subjects]
        running = _TIMES_FIRST * len(contest.subjects) * doing.first_s
        return self._patience_s + extra + sum(sizes) / _READ_BYTES_PER_S + running

    def _started(self) -> subprocess.Popen[bytes]:
        # As multiprocessing does for the processes it spawns: what can be imported here can be there.
        path = os.pathsep.join(entry for entry in sys.path if entry)
        process = subprocess.Popen(  # noqa: S603 - our own interpreter
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert process.stdout is not None  # noqa: S101 - a pipe was asked for
        self._said = queue.SimpleQueue()
        threading.Thread(target=_listen, args=(process.stdout, self._said), daemon=True).start()
        return process

    def _end(self) -> str:
        """How the process ended, in words."""
        assert self._process is not None  # noqa: S101 - it was started
        try:
            code = self._process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            return "closed its output"
        if code == -_SIGKILL:
            return f"was killed (signal {-code}), most likely out of memory"
        return f"died (signal {-code})" if code < 0 else f"ended with exit code {code}"

    def _kill(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except OSError:  # what it did not read any more cannot be flushed
                    continue
        self._process = None


def _failed_on_device(contest: Contest, found: Finished) -> int | None:
    """The first subject that failed on a device, not at its provider's door; None if there is none."""
    for index, error in sorted(found.refused.items()):
        if contest.subjects[index].target.provider != "cpu" and not isinstance(error, ProviderError):
            return index
    return None


def _listen(source: IO[bytes], said: queue.SimpleQueue[Message | None]) -> None:
    while True:
        try:
            message = receive(source)
        except (OSError, ValueError):  # closed at this end
            message = None
        said.put(message)
        if message is None:
            return


@functools.cache
def shared() -> Child:
    """The measuring process of this one; ends with it."""
    child = Child()
    atexit.register(child.close)
    return child
