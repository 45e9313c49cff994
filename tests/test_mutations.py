"""Mutated files: refused in one line or read, checked and written back; never another exception, a crash or a hang."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path

import pytest
from mutations import mutants

from onnx_lowrank.errors import InputError
from onnx_lowrank.graph import check, check_file, inferred_shapes, load, save

KILL_AFTER_S = 10


def round_trip(path: Path) -> str:
    """Load, check, save and check again; says how it ended."""
    try:
        graph = load(path)
    except InputError as error:
        return "refused" if "\n" not in str(error) else f"message of several lines: {error}"
    out = path.with_name("out.onnx")
    check(graph)
    inferred_shapes(graph)
    save(graph, out)
    check_file(out, graph.tolerated)
    return "accepted"


def survive(cases: Iterable[bytes], job: Callable[[Path], str]) -> Iterator[str]:
    """Run `job` on each case in a warm worker; one that takes 10 s is killed, one that dies is replaced."""
    context = multiprocessing.get_context("spawn")
    worker, pipe = _start(context, job)
    try:
        for case in cases:
            pipe.send(case)
            if not pipe.poll(KILL_AFTER_S):
                worker.kill()
                yield "hangs"
            else:
                try:
                    yield pipe.recv()
                    continue
                except EOFError:
                    worker.join()
                    yield f"dies with exit code {worker.exitcode}"
            worker, pipe = _start(context, job)
    finally:
        worker.kill()
        worker.join()


def _start(context: SpawnContext, job: Callable[[Path], str]) -> tuple[SpawnProcess, Connection]:
    ours, theirs = context.Pipe()
    worker = context.Process(target=_work, args=(theirs, job), daemon=True)
    worker.start()
    theirs.close()
    return worker, ours


def _work(pipe: Connection, job: Callable[[Path], str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        while True:
            path.write_bytes(pipe.recv())
            try:
                pipe.send(job(path))
            except Exception as error:  # any exception at all is a finding
                pipe.send(f"{type(error).__name__}: {error}")


@pytest.mark.parametrize("seed", [0])
def test_mutants_are_refused_or_survive(seed: int) -> None:
    cases = list(mutants(seed, 300))
    ends = list(survive(cases, round_trip))
    found = {i: end for i, end in enumerate(ends) if end not in {"refused", "accepted"}}
    assert found == {}
    assert min(ends.count("refused"), ends.count("accepted")) >= 20


def hang_and_crash(path: Path) -> str:
    """A job with the faults the harness must notice."""
    import os  # noqa: PLC0415
    import time  # noqa: PLC0415

    match path.read_bytes():
        case b"hang":
            time.sleep(60)
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
