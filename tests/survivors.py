"""Untrusted files through warm worker processes: one that hangs is killed, one that dies is replaced.

The limit is on processor time, which other processes on the machine do not use up; a worker that waits is killed too.
"""

from __future__ import annotations

import contextlib
import io
import math
import multiprocessing
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path

import onnx

from onnx_lowrank.cli import run
from onnx_lowrank.errors import InputError
from onnx_lowrank.graph import check, check_file, inferred_shapes, load, save

KILL_AFTER_CPU_S = 10
KILL_AFTER_S = 60
MEMORY_BYTES = 8 << 30  # of address space: a file that makes a worker ask for more must not take the machine down
MODEL, OUT = "model.onnx", "out.onnx"
FINE = {"exit 0", "exit 2", "exit 3"}
OPTIMIZE = ("--keep-macs", "0.5", "--threads", "1", "--time-limit", "0.1", "--json")


def round_trip(path: Path) -> str:
    """Load, check, save and check again; says how it ended."""
    try:
        graph = load(path)
    except InputError as error:
        return "refused" if "\n" not in str(error) else f"message of several lines: {error}"
    out = path.with_name(OUT)
    check(graph)
    inferred_shapes(graph)
    save(graph, out)
    check_file(out, graph.tolerated)
    return "accepted"


def optimize(path: Path) -> str:
    """The whole command; "exit 0", "exit 2" or "exit 3" if all it did and left behind fits that code."""
    before, out = path.read_bytes(), path.with_name(OUT)
    complaint = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(complaint):
        code = run(["optimize", str(path), "-o", str(out), *OPTIMIZE])
    last = complaint.getvalue().splitlines()[-1:]
    left = sorted(entry.name for entry in path.parent.iterdir())
    written = {0: True, 3: True, 2: False}.get(code)
    if written is None or left != ([MODEL, OUT] if written else [MODEL]):
        return f"exit {code} leaves {left}"
    if code and not (last and last[0].startswith("error: got ")):
        return f"exit {code} says {last}"
    if path.read_bytes() != before:
        return "the input has changed"
    if written:
        onnx.checker.check_model(str(out))
    return f"exit {code}"


def survive(cases: Iterable[bytes], job: Callable[[Path], str]) -> Iterator[str]:
    """How `job` ends on each case."""
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
                    over = worker.exitcode == -signal.SIGXCPU
                    yield "hangs" if over else f"dies with exit code {worker.exitcode}"
            worker, pipe = _start(context, job)
    finally:
        worker.kill()
        worker.join()


def _start(context: SpawnContext, job: Callable[[Path], str]) -> tuple[SpawnProcess, Connection]:
    ours, theirs = context.Pipe()
    worker = context.Process(target=_work, args=(theirs, job), daemon=True)
    worker.start()
    theirs.close()
    assert ours.recv() == "ready"  # importing everything does not count as hanging
    return worker, ours


def _work(pipe: Connection, job: Callable[[Path], str]) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    pipe.send("ready")
    with tempfile.TemporaryDirectory() as folder:
        while True:
            case = pipe.recv()
            limit = math.ceil(time.process_time()) + KILL_AFTER_CPU_S
            resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
            with tempfile.TemporaryDirectory(dir=folder) as room:
                path = Path(room) / MODEL
                path.write_bytes(case)
                try:
                    end = job(path)
                except Exception as error:  # any exception at all is a finding
                    end = f"{type(error).__name__}: {error}"
            pipe.send(end)
