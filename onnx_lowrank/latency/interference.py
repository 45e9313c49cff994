"""What else the machine does while it measures: a kernel of fixed work, and cores of one's own.

The same small matrix product is run before and after every round. A round counts as disturbed if

* the kernel took more processor time than 1.3 times its best: something shares the core's units, its caches or its
  power. A quiet machine's kernel stays within 1.1 of its best; a busy sibling hyperthread costs 1.4 and more;
* or others took more than a tenth of the round's wall time: interrupts take about a hundredth, a second process on the
  same core a half. Where the round is one thread that never waits, that is the time it did not run; where there are
  more, the time that threads of this process could have run and waited for a core, as Linux counts it.

The two see different things: processor time does not count while another process runs, wall time does not tell a slow
processor from a long computation. Nothing looks at an accelerator: what others compute there shows in the scatter of
the ratios alone.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from onnx import parser

from onnx_lowrank.latency.turns import thread_clock
from onnx_lowrank.runtime import open_session
from onnx_lowrank.target import Target

SLOWER = 1.3
STOLEN = 0.1
_SIDE = 192
_TRIES = 3
_MOST_CORES = 16
_WARM_UP_RUNS = 20
_PRODUCTS = f"""
    <ir_version: 7, opset_import: ["": 13]>
    kernel (float[{_SIDE},{_SIDE}] x) => (float[{_SIDE},{_SIDE}] y)
    {{ a = MatMul(x, x)  b = MatMul(a, x)  c = MatMul(b, x)  y = MatMul(c, x) }}
"""


@dataclass(frozen=True)
class Moment:
    """A point in time, in seconds.

    Args:
        wall: On the wall.
        lost: What others have taken so far from what is measured.
    """

    wall: float
    lost: float

    @staticmethod
    def of_this_thread() -> Moment:
        """Lost is what the calling thread did not run."""
        wall = time.perf_counter()
        return Moment(wall, wall - time.thread_time())

    @staticmethod
    def unseen() -> Moment:
        """What others have taken is not known."""
        return Moment(time.perf_counter(), 0.0)

    @staticmethod
    def of_all_threads() -> Moment:
        """Lost is what threads of this process waited for a core; nothing where the system does not tell."""
        return Moment(time.perf_counter(), _waited_ns() / 1e9)

    def stolen_until(self, end: Moment) -> float:
        """Share of the wall time up to `end` that others took."""
        return max(0.0, end.lost - self.lost) / max(end.wall - self.wall, 1e-9)


def _waited_ns(tasks: Path = Path("/proc/self/task")) -> int:
    """Nanoseconds that the threads there are could have run and did not: the second number of every schedstat."""
    waited = 0
    with contextlib.suppress(OSError):
        for task in tasks.iterdir():
            with contextlib.suppress(OSError, IndexError):  # a thread that has ended meanwhile
                waited += int((task / "schedstat").read_text().split()[1])
    return waited


@dataclass
class Interference:
    """Judges rounds; a `measure.Witness`.

    Args:
        kernel: Does a fixed amount of work and returns the processor seconds it took.
        now: Says what time it is, and what others have taken.
        best: Processor seconds of the kernel on an undisturbed machine, as far as known.
    """

    kernel: Callable[[], float]
    now: Callable[[], Moment] = Moment.of_this_thread
    best: float = math.inf
    _slow: bool = field(default=False, init=False)
    _start: Moment | None = field(default=None, init=False)

    def begin(self) -> None:
        """A round starts now. The kernel ran after the last one already, unless this is the first."""
        if self._start is None:
            self._look()
        self._start = self.now()

    def disturbed(self) -> bool:
        """Whether the kernel was slow before or after the round that ends now, or others ran in between."""
        assert self._start is not None  # noqa: S101 - begin comes first
        stolen = self._start.stolen_until(self.now())
        slow_before = self._slow
        self._look()
        return slow_before or self._slow or stolen > STOLEN

    def _look(self) -> None:
        took = self.kernel()
        self.best = min(self.best, took)
        self._slow = took > SLOWER * self.best


def matrix_products() -> Callable[[], float]:
    """The kernel: four products of 192 x 192 matrices on one thread, about 1 ms; returns its processor seconds.

    Where the thread's clock is too coarse, those on the wall: rounds beside other work count as disturbed then, too.
    """
    model = parser.parse_model(_PRODUCTS).SerializeToString()
    eye = np.eye(_SIDE, dtype=np.float32)
    bound = open_session(model, Target(threads=1)).bind({"x": eye})
    now = thread_clock().now

    def kernel() -> float:
        start = now()
        bound.seconds()
        return now() - start

    for _ in range(_WARM_UP_RUNS):
        kernel()
    return kernel


def pin(
    threads: int, kernel: Callable[[], float], allowed: set[int], topology: Path = Path("/sys/devices/system/cpu")
) -> tuple[int, ...]:
    """Bind this thread, and the threads it will start, to the cores that are fastest at the moment.

    Hyperthreads of one core are taken together only where there are fewer cores than threads: two of them share its
    units, and look as fast as any while they are tried alone.

    Args:
        threads: As many cores.
        kernel: Is run on every core to see how fast that one is.
        allowed: Cores to choose from.
        topology: Where the system tells which cores are hyperthreads of one.

    Returns:
        The cores; empty where a process cannot be bound.
    """
    if not hasattr(os, "sched_setaffinity"):
        return ()
    speed: dict[int, float] = {}
    for core in _apart(sorted(allowed), topology)[: max(_MOST_CORES, threads)]:
        os.sched_setaffinity(0, {core})
        start = time.perf_counter()  # waiting for a busy core counts
        for _ in range(_TRIES):
            kernel()
        speed[core] = time.perf_counter() - start
    chosen = tuple(sorted(_apart(sorted(speed, key=speed.__getitem__), topology)[:threads]))
    os.sched_setaffinity(0, chosen)
    return chosen


def _apart(fastest_first: Sequence[int], topology: Path) -> list[int]:
    """The cores in the same order, but those that share one with a core before them at the end."""
    shared: dict[str, int] = {}
    alone: list[int] = []
    beside: list[int] = []
    for core in fastest_first:
        try:
            siblings = (topology / f"cpu{core}/topology/thread_siblings_list").read_text().strip()
        except OSError:
            siblings = str(core)
        (alone if shared.setdefault(siblings, core) == core else beside).append(core)
    return alone + beside
