"""Fixtures that several rooms share."""

from __future__ import annotations

import os

# Before numpy is imported, here and in every process of a test: threads that wait for each other at small matrices take
# ten times as long on a machine that others use too, as the workers of pytest-xdist do.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Consoles that are made on import would keep this width, whatever a test says; workers of pytest-xdist have it set.
os.environ.pop("COLUMNS", None)
os.environ.pop("LINES", None)

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from plugins import install

from onnx_lowrank.catalogue import discover
from onnx_lowrank.latency.table import CACHE_VARIABLE
from onnx_lowrank.search.racer import Racer


@pytest.fixture(scope="session")
def latencies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache folder for the whole session: no test touches the user's."""
    return tmp_path_factory.mktemp("latencies")


@pytest.fixture(scope="module")
def quick(latencies: Path) -> Iterator[None]:
    """Short races in one process: what tiny models gain does not matter to tests, only that they were really run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(latencies))
        patch.setattr("onnx_lowrank.search.prepare.Racer", partial(Racer, seconds=0.3))
        patch.setattr("onnx_lowrank.latency.race.SITTINGS", 1)
        yield


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Source file of a third party's package with an entry point, empty as yet."""
    monkeypatch.syspath_prepend(tmp_path)
    discover.cache_clear()
    yield install(tmp_path)
    discover.cache_clear()
