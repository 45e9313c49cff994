"""The measuring process: opens models and times them in turns; what crashes or hangs here crashes or hangs alone.

Started by `child.Child`; contests come on standard input, answers go to standard output.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from onnx_lowrank.errors import LowRankError
from onnx_lowrank.latency.interference import Interference, Moment, matrix_products, pin
from onnx_lowrank.latency.measure import Run, in_turns
from onnx_lowrank.latency.messages import Broken, Contest, Finished, Message, Subject, Working, receive, send
from onnx_lowrank.latency.turns import Now
from onnx_lowrank.runtime import open_session

_BEAT_S = 1.0


@dataclass(frozen=True, eq=False)
class OverSamples:
    """One run on every sample, weighted."""

    runs: Sequence[tuple[Run, float]]

    def seconds(self, now: Now = time.perf_counter) -> float:
        """Weighted sum over the samples."""
        return sum(weight * run.seconds(now) for run, weight in self.runs)


@dataclass(frozen=True, eq=False)
class OpenedEachTime:
    """A model too large to stay open beside others: opened, run once to warm up, timed, closed."""

    subject: Subject

    def seconds(self, now: Now = time.perf_counter) -> float:
        """Weighted sum over the samples of the median of three runs, without opening and warming up."""
        session = open_session(self.subject.model, self.subject.target, self.subject.level)
        return sum(weight * statistics.median(session.time(feeds, 3, now)) for feeds, weight in self.subject.samples)


def opened(subject: Subject) -> Run:
    """A subject with its inputs bound, run once.

    Raises:
        LowRankError: if it does not open or run.
    """
    session = open_session(subject.model, subject.target, subject.level)
    return OverSamples([(session.bind(feeds), weight) for feeds, weight in subject.samples])


def waits(contest: Contest) -> bool:
    """Whether the measuring thread waits while its models run: for other threads, a device, or a file being opened."""
    return contest.one_by_one or not all(subject.target.in_calling_thread for subject in contest.subjects)


@dataclass
class Worker:
    """Answers contests.

    Args:
        say: Sends a message to the parent.
        open_run: Makes a subject ready to run.
    """

    say: Callable[[Message], None]
    open_run: Callable[[Subject], Run] = opened
    _kernel: Callable[[], float] = field(default_factory=matrix_products, init=False)
    _cores: dict[int, tuple[int, ...]] = field(default_factory=dict[int, tuple[int, ...]], init=False)
    _allowed: set[int] = field(init=False)
    _best: float = field(default=float("inf"), init=False)
    _at: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        """Remember the cores there are before binding to some of them."""
        self._allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()

    def answer(self, contest: Contest) -> Finished | Broken:
        """Open the subjects, time them in turns, close them."""
        try:
            return self._measured(contest)
        except MemoryError:
            return Broken("ran out of memory", self._at)
        except Exception as error:
            return Broken(f"failed ({type(error).__name__}: {' '.join(str(error).split())[:300]})", self._at)

    def _measured(self, contest: Contest) -> Finished:
        cores = self._pinned(max(subject.target.threads for subject in contest.subjects))
        runs: list[Run] = []
        refused: dict[int, LowRankError] = {}
        first_s = 0.0
        for index, subject in enumerate(contest.subjects):
            self._at = index
            self.say(Working(index, first_s))
            try:
                runs.append(OpenedEachTime(subject) if contest.one_by_one else self.open_run(subject))
                spent = runs[-1].seconds()
                first_s = first_s or spent
            except LowRankError as error:
                refused[index] = error
        self._at = None
        self.say(Working(first_s=first_s))
        if not runs:
            return Finished(None, refused)
        now = Moment.of_this_thread if not waits(contest) else Moment.of_all_threads
        if contest.one_by_one or max(subject.target.threads for subject in contest.subjects) > len(cores):
            now = Moment.unseen  # threads that ended do not tell, and more than there are cores wait for each other
        witness = _Beating(self._kernel, now, min(self._best, contest.best))
        witness.beat = lambda: self.say(Working(first_s=first_s))
        paired = in_turns(runs, contest.until, contest.clock, witness)
        self._best = witness.best
        return Finished(paired.on(cores), refused, self._best)

    def _pinned(self, threads: int) -> tuple[int, ...]:
        """The same cores for the same number of threads, as long as this process lives."""
        if threads not in self._cores:
            self._cores[threads] = pin(threads, self._kernel, self._allowed)
        elif self._cores[threads]:
            os.sched_setaffinity(0, self._cores[threads])
        return self._cores[threads]


@dataclass
class _Beating(Interference):
    """Says once a second, between rounds, that the process is alive: more would wake up the parent beside it."""

    beat: Callable[[], None] = field(default=lambda: None)
    _last: float = field(default_factory=time.monotonic, init=False)

    def begin(self) -> None:
        if time.monotonic() - self._last > _BEAT_S:
            self.beat()
            self._last = time.monotonic()
        super().begin()


def serve(source: IO[bytes], sink: IO[bytes], open_run: Callable[[Subject], Run] = opened) -> None:
    """Say that it is ready, then answer contests until the other end is gone."""
    worker = Worker(lambda message: send(sink, message), open_run)
    requests: queue.SimpleQueue[Message] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(source, requests), daemon=True).start()
    send(sink, Working())
    while True:
        request = requests.get()
        assert isinstance(request, Contest)  # noqa: S101 - the parent sends nothing else
        send(sink, worker.answer(request))


def _read(source: IO[bytes], requests: queue.SimpleQueue[Message]) -> None:
    """Beside the measurement, so that it ends in the middle of it when the parent does."""
    while (request := receive(source)) is not None:
        requests.put(request)
    os._exit(0)


def main(open_run: Callable[[Subject], Run] = opened) -> None:
    """Serve on this process's standard streams."""
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends this process
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # out of memory, the system shall end this process first
    sink = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what native code prints is no answer
    with contextlib.suppress(BrokenPipeError):
        serve(sys.stdin.buffer, sink, open_run)
    os._exit(0)  # an orderly end would wait for the thread that reads, and complain about it
