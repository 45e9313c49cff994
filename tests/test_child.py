"""A measuring process that crashes, hangs, runs out of memory or is killed costs one measurement, and is named."""

from __future__ import annotations

import io
import os
import signal
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import conv_model
from test_prices import chain, layer

from onnx_lowrank.errors import InputError, PassError
from onnx_lowrank.latency.chains import ChainTimer
from onnx_lowrank.latency.child import COMMAND, Child, MeasuringError
from onnx_lowrank.latency.measure import Clock, Until
from onnx_lowrank.latency.messages import Contest, Finished, Message, Subject, Working, receive, send
from onnx_lowrank.latency.pieces import Job
from onnx_lowrank.latency.table import LatencyTable
from onnx_lowrank.latency.worker import OpenedEachTime, Worker, waits
from onnx_lowrank.target import Target

ONE = Target(threads=1)
SHORT = Until(rounds=5, budget_s=0.2)
# A provider that misbehaves on the chain of rank 5, when it is opened or when it is run.
PROVIDER = """
import os, signal, sys, time, types
package = sys.modules["onnx_lowrank"] = types.ModuleType("onnx_lowrank")  # as child.COMMAND does: it starts sooner
package.__path__ = [sys.argv[1]]
from onnx_lowrank.latency.worker import main, opened

def misbehave():
    {deed}

class Run:
    def __init__(self, run):
        self.run, self.left = run, {runs}
    def seconds(self, *now):
        self.left -= 1
        if self.left < 0:
            misbehave()
        return self.run.seconds(*now)

def open_run(subject):
    import onnx
    model = subject.model if isinstance(subject.model, bytes) else subject.model.read_bytes()
    shapes = [tuple(tensor.dims) for tensor in onnx.load_from_string(model).graph.initializer]
    run = opened(subject)
    return Run(run) if any({culprit} in shape for shape in shapes) else run

main(open_run)
"""
# A provider whose memory holds three sessions at once.
SMALL = """
import sys, types, weakref
package = sys.modules["onnx_lowrank"] = types.ModuleType("onnx_lowrank")
package.__path__ = [sys.argv[1]]
from onnx_lowrank.latency.worker import main, opened

class Run:
    def __init__(self, run):
        self.seconds = run.seconds

alive = weakref.WeakSet()

def open_run(subject):
    run = Run(opened(subject))
    alive.add(run)
    if len(alive) > 3:
        raise MemoryError
    return run

main(open_run)
"""
# A device on which nothing runs any more in a process that has run the chain of rank 5.
POISONED = """
import dataclasses, sys, types
package = sys.modules["onnx_lowrank"] = types.ModuleType("onnx_lowrank")
package.__path__ = [sys.argv[1]]
from onnx_lowrank.errors import InputError
from onnx_lowrank.latency.worker import main, opened
from onnx_lowrank.target import Target

broken = []

def open_run(subject):
    import onnx
    shapes = [tuple(tensor.dims) for tensor in onnx.load_from_string(subject.model).graph.initializer]
    if any(5 in shape for shape in shapes):
        broken.append(True)
    if broken:
        raise InputError("an illegal address", "another one", "start anew")
    return opened(dataclasses.replace(subject, target=Target(threads=1)))

main(open_run)
"""
SEGFAULT = "os.kill(os.getpid(), signal.SIGSEGV)"
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"
HANG = "time.sleep(600)"
NO_MEMORY = "bytearray(1 << 62)"
LEAVE = "os._exit(3)"
FOREIGN = "raise KeyError('no such kernel')"


def provider(tmp_path: Path, deed: str, runs: int = 0, culprit: int = 5) -> tuple[str, ...]:
    """The command of a measuring process with that provider; it behaves for `runs` runs of the culprit."""
    path = tmp_path / "provider.py"
    path.write_text(textwrap.dedent(PROVIDER).format(deed=deed, runs=runs, culprit=culprit))
    return sys.executable, str(path), COMMAND[-1]


def subject(side: int = 8) -> Subject:
    model = conv_model((1, 3, side, side), (4, 3, 3, 3)).SerializeToString()
    return Subject(model, "all", ONE, [({"x": np.ones((1, 3, side, side), np.float32)}, 1.0)])


def contest(*subjects: Subject, until: Until = SHORT) -> Contest:
    return Contest(subjects or [subject(), subject(16)], until, Clock.CPU)


def gone(pid: int) -> bool:
    """Whether a process ends within a few seconds."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat")
            if state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize(
    ("deed", "reason", "runs"),
    [
        (SEGFAULT, "the measuring process died (signal 11)", 0),
        (SEGFAULT, "the measuring process died (signal 11)", 9),
        (KILLED, "the measuring process was killed (signal 9), most likely out of memory", 0),
        (HANG, "the measuring process did not answer within ", 0),
        (HANG, "the measuring process did not answer within ", 9),
        (NO_MEMORY, "the measuring process ran out of memory", 0),
        (LEAVE, "the measuring process ended with exit code 3", 0),
        (FOREIGN, "the measuring process failed (KeyError: 'no such kernel')", 0),
    ],
)
def test_only_the_culprit_is_dropped(tmp_path: Path, deed: str, reason: str, runs: int) -> None:
    patience = 8.0 if deed == HANG else 60.0
    with LatencyTable(tmp_path / "t.sqlite") as table:
        child = Child(provider(tmp_path, deed, runs), patience)
        timer = ChainTimer(ONE, table, child=child)
        jobs = [Job(layer()), *(Job(layer(), chain(rank)) for rank in (4, 5, 6))]
        prices = timer.price(jobs)
        child.close()
        assert [price is None for price in prices] == [False, False, True, False]
        assert [dropped.chain for dropped in timer.dropped] == [chain(5)]
        assert timer.dropped[0].reason.startswith(reason)
        assert timer.timed == 3


def started(tmp_path: Path, text: str) -> Child:
    path = tmp_path / "provider.py"
    path.write_text(text)
    return Child((sys.executable, str(path), COMMAND[-1]))


def test_what_does_not_fit_into_memory_together_is_timed_apart(tmp_path: Path) -> None:
    with LatencyTable(tmp_path / "t.sqlite") as table:
        child = started(tmp_path, SMALL)
        timer = ChainTimer(ONE, table, child=child)
        prices = timer.price([Job(layer()), *(Job(layer(), chain(rank)) for rank in (4, 5, 6, 7))])
        child.close()
        assert None not in prices
        assert not timer.dropped
        assert timer.timed == 5


def test_what_a_failed_chain_leaves_behind_on_a_device_harms_no_other(tmp_path: Path) -> None:
    with LatencyTable(tmp_path / "t.sqlite") as table:
        child = started(tmp_path, POISONED)
        timer = ChainTimer(Target("cuda", threads=1), table, child=child)
        prices = timer.price([Job(layer()), *(Job(layer(), chain(rank)) for rank in (4, 5, 6))])
        child.close()
        assert [price is None for price in prices] == [False, False, True, False]
        assert [(dropped.chain, dropped.reason) for dropped in timer.dropped] == [
            (chain(5), "got an illegal address; expected another one; start anew")
        ]


def test_a_process_that_failed_on_a_device_is_not_asked_again(tmp_path: Path) -> None:
    child = started(tmp_path, POISONED)
    feeds = [({"x": np.ones((1, 3, 8, 8), np.float32)}, 1.0)]
    gpu = Target("cuda", threads=1)
    good, bad = (
        Subject(conv_model((1, 3, 8, 8), (out, 3, 3, 3)).SerializeToString(), "all", gpu, feeds) for out in (4, 5)
    )
    wall = Contest([bad], SHORT, Clock.WALL)
    assert list(child.ask(wall).refused) == [0]
    assert not child.ask(Contest([good], SHORT, Clock.WALL)).refused
    child.close()


def test_a_layer_it_dies_of_takes_its_chains_with_it(tmp_path: Path) -> None:
    with LatencyTable(tmp_path / "t.sqlite") as table:
        child = Child(provider(tmp_path, SEGFAULT, culprit=16))  # 16 output channels: the layer and all its chains
        timer = ChainTimer(ONE, table, child=child)
        assert timer.price([Job(layer()), Job(layer(), chain(4))]) == [None, None]
        assert {dropped.reason for dropped in timer.dropped} == {"the measuring process died (signal 11)"}
        child.close()


def test_killed_in_the_middle_it_is_started_again() -> None:
    child = Child()
    assert child.ask(contest()).paired is not None
    first = child.pid
    assert first is not None
    threading.Timer(1.0, os.kill, (first, signal.SIGKILL)).start()
    with pytest.raises(
        MeasuringError, match=r"^got models whose measuring process was killed \(signal 9\), most likely"
    ):
        child.ask(contest(until=Until(budget_s=60.0, half_width=0.0)))
    assert gone(first)
    found = child.ask(contest())
    assert found.paired is not None
    assert found.paired.rounds >= 5
    assert child.pid not in {first, None}
    child.close()
    assert child.pid is None


def test_interrupted_it_is_ended_at_once() -> None:
    child = Child()
    child.ask(contest())
    pid = child.pid
    assert pid is not None
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            child.ask(contest(until=Until(budget_s=60.0, half_width=0.0)))
    finally:
        signal.signal(signal.SIGINT, previous)
    assert time.monotonic() - start < 30
    assert child.pid is None
    assert gone(pid)


def test_what_does_not_open_is_refused_and_the_rest_timed() -> None:
    child = Child()
    broken = Subject(b"no model", "all", ONE, [])
    found = child.contest(contest(subject(), broken, subject(16)))
    child.close()
    assert list(found.refused) == [1]
    assert isinstance(found.refused[1], InputError)
    assert "a model of 8 bytes" in str(found.refused[1])
    assert found.paired is not None
    assert len(found.paired.ratios) == 2


def test_pinned_to_one_core_per_thread() -> None:
    allowed = os.sched_getaffinity(0)
    child = Child()
    found = child.ask(contest()).paired
    child.close()
    assert found is not None
    assert len(found.cores) == 1
    assert set(found.cores) <= allowed
    assert os.sched_getaffinity(0) == allowed


def test_a_worker_says_what_it_is_about_to_open(tmp_path: Path) -> None:
    allowed = os.sched_getaffinity(0)
    said: list[Message] = []
    path = tmp_path / "m.onnx"
    onnx.save(onnx.load_from_string(subject().model), path)  # pyright: ignore[reportArgumentType] - bytes
    try:
        found = Worker(said.append).answer(contest(subject(), Subject(path, "all", ONE, subject().samples)))
    finally:
        os.sched_setaffinity(0, allowed)
    assert isinstance(found, Finished)
    assert [message.index for message in said if isinstance(message, Working)][:3] == [0, 1, None]


def test_what_is_opened_each_time_takes_the_median_of_its_runs() -> None:
    run = OpenedEachTime(replace(subject(), samples=[(subject().samples[0][0], 2.0)]))
    readings = iter([0.0, 1.0, 10.0, 15.0, 20.0, 22.0])  # runs of one, five and two seconds
    assert run.seconds(lambda: next(readings)) == 4.0


def test_time_that_went_to_others_is_looked_for_where_the_thread_never_waits() -> None:
    two = replace(subject(), target=Target(threads=2))
    for clock in Clock:
        assert not waits(Contest([subject()], SHORT, clock))
        assert waits(Contest([subject(), two], SHORT, clock))
        assert waits(Contest([subject()], SHORT, clock, one_by_one=True))


def test_messages_survive_the_way_and_half_ones_are_none() -> None:
    pipe = io.BytesIO()
    error = PassError("fuse", "node", "a", "b", "c")
    send(pipe, Finished(None, {3: error}))
    whole = pipe.getvalue()
    back = receive(io.BytesIO(whole))
    assert isinstance(back, Finished)
    assert str(back.refused[3]) == str(error)
    assert vars(back.refused[3]) == vars(error)
    assert receive(io.BytesIO(whole[:-1])) is None
    assert receive(io.BytesIO(whole[:3])) is None
