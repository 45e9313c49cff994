"""What is going on: phases with a name and a length. They are always timed, and shown by whoever wants to show them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

Advance = Callable[[int, int], None]
Show = Callable[[str], contextlib.AbstractContextManager[Advance]]


@contextlib.contextmanager
def silent(name: str) -> Generator[Advance]:  # noqa: ARG001 - the protocol's signature
    """Shows nothing."""
    yield _ignore


def _ignore(done: int, total: int) -> None: ...


@dataclass
class Phases:
    """Times the phases of a job.

    Args:
        show: Displays one phase; told how much of it is done.
    """

    show: Show = silent
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    _inner: list[float] = field(default_factory=list[float], init=False)

    @contextlib.contextmanager
    def phase(self, name: str) -> Generator[Advance]:
        """A phase; its seconds are added to what earlier phases of the same name took.

        Those of a phase inside another one count for the inner one only.
        """
        start = time.perf_counter()
        self._inner.append(0.0)
        try:
            with self.show(name) as advance:
                yield advance
        finally:
            took = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + took - self._inner.pop()
            if self._inner:
                self._inner[-1] += took
