"""Mutated files: refused in one line or worked on to a valid end; never another exception, a crash or a hang."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from mutations import mutants
from survivors import FINE, optimize, round_trip, survive

pytestmark = pytest.mark.usefixtures("quick")


def test_mutants_are_refused_or_survive_a_round_trip() -> None:
    ends = list(survive(mutants(0, 200), round_trip))
    assert {i: end for i, end in enumerate(ends) if end not in {"refused", "accepted"}} == {}
    assert min(ends.count("refused"), ends.count("accepted")) >= 20


@pytest.mark.parametrize(
    ("seed", "count"), [(1, 120), pytest.param(2, 10_000, marks=pytest.mark.slow)], ids=["some", "many"]
)
def test_mutants_are_refused_or_optimized(seed: int, count: int) -> None:
    """The same as `python -m benchmarks.fuzz`, which records what it finds."""
    ends = list(survive(mutants(seed, count), optimize))
    assert {i: end for i, end in enumerate(ends) if end not in FINE} == {}
    refused = ends.count("exit 2")
    assert min(refused, count - refused) >= count // 20


def hang_and_crash(path: Path) -> str:
    """A job with the faults the harness must notice."""
    match path.read_bytes():
        case b"hang":
            while True:
                pass
        case b"wait":
            time.sleep(600)
        case b"crash":
            os.abort()
        case b"raise":
            raise RuntimeError("fault")
        case _:
            pass
    return "accepted"


def test_harness_notices_crashes_and_exceptions() -> None:
    ends = list(survive([b"", b"raise", b"crash", b""], hang_and_crash))
    assert ends == ["accepted", "RuntimeError: fault", "dies with exit code -6", "accepted"]


@pytest.mark.slow
def test_harness_notices_hangs() -> None:
    ends = list(survive([b"hang", b"", b"wait", b""], hang_and_crash))
    assert ends == ["hangs", "accepted", "hangs", "accepted"]
