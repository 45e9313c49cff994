"""What the measuring process and its parent say to each other: pickles behind their length, over two pipes.

Both ends are this package, started by each other; nothing of a user's file is ever unpickled.
"""

from __future__ import annotations

import math
import pickle
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from onnx_lowrank.errors import LowRankError
from onnx_lowrank.latency.measure import Clock, Paired, Until
from onnx_lowrank.signature import Feeds
from onnx_lowrank.target import Target

Weighted = tuple[Feeds, float]
_LENGTH = struct.Struct(">Q")


@dataclass(frozen=True, eq=False)
class Subject:
    """A model to be timed.

    Args:
        model: A file, or a serialized model.
        level: Graph optimization level.
        target: Where to run it.
        samples: Inputs, and how much each counts in the latency.
    """

    model: Path | bytes
    level: str
    target: Target
    samples: Sequence[Weighted]


@dataclass(frozen=True, eq=False)
class Contest:
    """Models to be timed in turns.

    Args:
        subjects: The first is the one the others are compared with.
        until: When to stop.
        clock: What to read.
        one_by_one: Too large to be open together: each is opened for every sample.
        best: Processor seconds of the calibration kernel on this machine undisturbed, as far as known.
    """

    subjects: Sequence[Subject]
    until: Until
    clock: Clock
    one_by_one: bool = False
    best: float = math.inf


@dataclass(frozen=True)
class Working:
    """The measuring process is alive.

    Args:
        index: The subject it is about to open and run; None while all run in turns.
        first_s: Wall clock of one run of the first subject, once known.
    """

    index: int | None = None
    first_s: float = 0.0


@dataclass(frozen=True, eq=False)
class Finished:
    """What came out.

    Args:
        paired: Of the subjects that opened, in order; None if none did.
        refused: The others, by index.
        best: See `Contest`.
    """

    paired: Paired | None
    refused: Mapping[int, LowRankError]
    best: float = math.inf


@dataclass(frozen=True)
class Broken:
    """Something failed in a way no one foresaw, while subject `index` was opened (None: later)."""

    reason: str
    index: int | None


Message = Contest | Working | Finished | Broken


def send(sink: IO[bytes], message: Message) -> None:
    """Write one message.

    Raises:
        OSError: if the other end is gone.
    """
    payload = pickle.dumps(message, protocol=5)
    sink.write(_LENGTH.pack(len(payload)))
    sink.write(payload)
    sink.flush()


def receive(source: IO[bytes]) -> Message | None:
    """The next message; None if the other end is gone, even in the middle of one."""
    head = source.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    payload = source.read(length)
    return pickle.loads(payload) if len(payload) == length else None  # noqa: S301 - our own other end
