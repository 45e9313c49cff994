"""The kernels of a model, timed by onnxruntime's profiler.

It slows a model down, so it only says how the time is shared out; latency comes from races. Node names in its profile
are those of the optimized graph; `attribution` leads them back to the user's names as far as they tell.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx

from onnx_lowrank.graph.size import file_bytes
from onnx_lowrank.kernel_trace import KernelEvent
from onnx_lowrank.profile.attribution import name_nodes
from onnx_lowrank.runtime import open_session
from onnx_lowrank.signature import Feeds
from onnx_lowrank.target import Target

_PROFILED_RUNS = (5, 50)
_PROFILED_MS = 500.0
_IN_MEMORY_BYTES = 1 << 30


def profiled(
    path: Path, level: str, feeds: Feeds, target: Target, expected_ms: float
) -> tuple[list[KernelEvent], onnx.GraphProto]:
    """The kernels of one run, and the graph whose nodes they are to be led back to.

    Args:
        path: The file.
        level: Graph optimization level.
        feeds: One sample.
        target: Where to run.
        expected_ms: Latency of one run, which tells how many to take the medians of.

    Raises:
        InputError, ProviderError: if it does not open or run.
    """
    least, most = _PROFILED_RUNS
    runs = min(most, max(least, int(_PROFILED_MS / expected_ms)))
    model = onnx.load(path, load_external_data=False)
    source: Path | bytes = path
    if file_bytes(path) == path.stat().st_size < _IN_MEMORY_BYTES:
        name_nodes(model.graph)  # the profile says nothing about nodes without a name
        source = model.SerializeToString()
    with tempfile.TemporaryDirectory(prefix="onnx-lowrank-") as folder:
        session = open_session(source, target, level, profile_to=Path(folder))
        for _ in range(runs + 1):
            session.run(feeds)
        events = session.profile_events()
    return _undisturbed(events, runs + 1), model.graph


def _undisturbed(events: list[KernelEvent], runs: int) -> list[KernelEvent]:
    """One run whose kernels took their median over the runs; the first one, which also allocates, is left out.

    A disturbance hits nearly every run of a busy machine, but each kernel in few of them.
    """
    size = len(events) // runs
    if len(events) % runs:  # runs of different length: loops and branches
        return events[size:]
    return [
        replace(event, microseconds=float(np.median([other.microseconds for other in events[size + place :: size]])))
        for place, event in enumerate(events[:size])
    ]
