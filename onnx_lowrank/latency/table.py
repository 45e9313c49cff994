"""Latencies measured before, in an SQLite file under the user's cache directory that several processes may share."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import sqlite3
import time
from pathlib import Path
from types import TracebackType

import platformdirs

from onnx_lowrank.latency.machine import fingerprint
from onnx_lowrank.runtime import versions
from onnx_lowrank.target import Target

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "ONNX_LOWRANK_CACHE"
_SCHEMA = 1
_CREATE = f"""
    BEGIN IMMEDIATE;
    CREATE TABLE IF NOT EXISTS latency (
        key TEXT PRIMARY KEY, median_ms REAL NOT NULL, samples INTEGER NOT NULL,
        what TEXT NOT NULL, created REAL NOT NULL);
    CREATE TABLE IF NOT EXISTS fact (key TEXT PRIMARY KEY, value TEXT NOT NULL, created REAL NOT NULL);
    PRAGMA user_version = {_SCHEMA};
    COMMIT;
"""


def cache_folder() -> Path:
    """Where measurements are kept: $ONNX_LOWRANK_CACHE, else the user's cache directory."""
    override = os.environ.get(CACHE_VARIABLE)
    return Path(override) if override else platformdirs.user_cache_path("onnx-lowrank", appauthor=False)


def table_key(what: str, target: Target, level: str) -> str:
    """The key of a measurement: content and shapes (`what`), and everything else its value depends on."""
    return hashlib.sha256(f"{what} {_circumstances(target, level)}".encode()).hexdigest()


@functools.cache
def _circumstances(target: Target, level: str) -> str:
    options = sorted(target.provider_options.items())
    installed = versions()
    software = (installed["onnxruntime"], installed.get("onnx-lowrank", ""))
    return repr((target.provider_name, options, target.threads, level, fingerprint(target), software))


class LatencyTable:
    """A content-keyed table of measured latencies and facts learnt about the machine.

    A file that is damaged, or of another schema, is moved aside with a warning. Where the folder cannot be written the
    table lives in memory, with a warning.

    Args:
        path: The file; None means `latency.sqlite` in `cache_folder()`.

    Attributes:
        hits: Latencies found by `get` so far.
        misses: Latencies `get` did not find.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or cache_folder() / "latency.sqlite"
        self.hits = self.misses = 0
        self._connection = self._open()

    def __enter__(self) -> LatencyTable:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __len__(self) -> int:
        return int(self._connection.execute("SELECT count(*) FROM latency").fetchone()[0])

    def get(self, key: str) -> float | None:
        """The median in milliseconds, or None if it was never measured."""
        row = self._connection.execute("SELECT median_ms FROM latency WHERE key = ?", (key,)).fetchone()
        if row is None:
            self.misses += 1
            return None
        self.hits += 1
        return float(row[0])

    def put(self, key: str, median_ms: float, samples: int = 1, what: str = "") -> None:
        """Remember a latency; one measured earlier is replaced."""
        row = (key, median_ms, samples, what, time.time())
        self._write("INSERT OR REPLACE INTO latency VALUES (?, ?, ?, ?, ?)", row)

    def fact(self, key: str) -> str | None:
        """Something learnt about the machine, or None."""
        row = self._connection.execute("SELECT value FROM fact WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def put_fact(self, key: str, value: str) -> None:
        """Remember something learnt about the machine."""
        self._write("INSERT OR REPLACE INTO fact VALUES (?, ?, ?)", (key, value, time.time()))

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def _write(self, statement: str, row: tuple[object, ...]) -> None:
        try:
            self._connection.execute(statement, row)
        except sqlite3.OperationalError as error:  # disk full, or locked for longer than the time-out: it is a cache
            logger.warning("a measurement could not be kept in %s (%s)", self.path, error)

    def _open(self) -> sqlite3.Connection:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return _connect(self.path)
        except sqlite3.OperationalError as error:
            logger.warning("measurements are not kept: %s cannot be opened (%s)", self.path, error)
        except sqlite3.DatabaseError as error:
            return self._start_anew(error)
        except OSError as error:
            logger.warning("measurements are not kept: %s cannot be written (%s)", self.path.parent, error)
        return _connect(":memory:")

    def _start_anew(self, reason: Exception) -> sqlite3.Connection:
        aside = self.path.with_name(f"{self.path.name}.unusable-{time.time_ns()}")
        self.path.replace(aside)
        for suffix in ("-wal", "-shm"):
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
        logger.warning("latency table %s is unusable (%s); it was moved to %s", self.path, reason, aside.name)
        return _connect(self.path)


def _connect(path: Path | str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=30.0, isolation_level=None)  # every statement is its own transaction
    try:
        _prepare(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection) -> None:
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version not in {0, _SCHEMA}:
        raise sqlite3.DatabaseError(f"schema {version}, expected {_SCHEMA}")
    if version == 0:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(_CREATE)
    connection.execute("PRAGMA synchronous = NORMAL")
    state = connection.execute("PRAGMA quick_check").fetchone()[0]
    if state != "ok":
        raise sqlite3.DatabaseError(state)
