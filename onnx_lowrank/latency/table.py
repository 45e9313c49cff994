"""Latencies measured before, in an SQLite file under the user's cache directory that several processes may share."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sqlite3
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import platformdirs

from onnx_lowrank.errors import InputError
from onnx_lowrank.latency.circumstances import Circumstances

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "ONNX_LOWRANK_CACHE"
CHAIN, MODEL = "chain", "model"
_SCHEMA = 3
_CREATE = f"""
    BEGIN IMMEDIATE;
    CREATE TABLE IF NOT EXISTS circumstances (
        digest TEXT PRIMARY KEY, device TEXT NOT NULL, provider TEXT NOT NULL, options TEXT NOT NULL,
        threads INTEGER NOT NULL, onnxruntime TEXT NOT NULL, level TEXT NOT NULL, clock TEXT NOT NULL,
        lowered_by TEXT NOT NULL);
    CREATE TABLE IF NOT EXISTS latency (
        key TEXT NOT NULL, circumstances TEXT NOT NULL REFERENCES circumstances (digest), kind TEXT NOT NULL,
        what TEXT NOT NULL, median_ms REAL, samples INTEGER NOT NULL, reason TEXT NOT NULL, measured REAL NOT NULL,
        disturbed INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (key, circumstances));
    CREATE TABLE IF NOT EXISTS fact (key TEXT PRIMARY KEY, value TEXT NOT NULL, created REAL NOT NULL);
    PRAGMA user_version = {_SCHEMA};
    COMMIT;
"""


@dataclass(frozen=True)
class Record:
    """One latency.

    Args:
        key: Content of what was timed, with its shapes; says nothing about circumstances.
        what: The same for a reader.
        ms: Median in milliseconds; None where it could not be timed.
        samples: How many the median is of.
        kind: "chain" (a layer is a chain too) or "model".
        reason: Why it could not be timed.
        measured: When, in seconds since 1970.
        disturbed: Timed beside other work on the machine, as far as that was seen.
    """

    key: str
    what: str
    ms: float | None
    samples: int
    kind: str = CHAIN
    reason: str = ""
    measured: float = field(default_factory=time.time)
    disturbed: bool = False


def cache_folder() -> Path:
    """Where measurements are kept: $ONNX_LOWRANK_CACHE, else the user's cache directory."""
    override = os.environ.get(CACHE_VARIABLE)
    return Path(override) if override else platformdirs.user_cache_path("onnx-lowrank", appauthor=False)


class LatencyTable:
    """A content-keyed table of measured latencies and facts learnt about machines.

    A file that is damaged, or of another schema, is moved aside with a warning. Where the folder cannot be written the
    table lives in memory, with a warning.

    Args:
        path: The file; None means `latency.sqlite` in `cache_folder()`.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or cache_folder() / "latency.sqlite"
        self._connection = self._open()
        self._known: set[str] = set()
        self._whole = False

    @staticmethod
    def in_memory() -> LatencyTable:
        """An empty table that is gone when it is closed."""
        return LatencyTable(Path(":memory:"))

    def __enter__(self) -> LatencyTable:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __len__(self) -> int:
        return int(self._connection.execute("SELECT count(*) FROM latency").fetchone()[0])

    def record(self, key: str, where: Circumstances) -> Record | None:
        """All that is known about something timed, or None."""
        query = f"SELECT {_FIELDS} FROM latency WHERE key = ? AND circumstances = ?"  # noqa: S608 - a constant
        row = self._connection.execute(query, (key, where.digest)).fetchone()
        return None if row is None else _record(row)

    def put(self, where: Circumstances, record: Record) -> None:
        """Remember a latency; one measured earlier is replaced."""
        digest = where.digest
        if digest not in self._known:
            names = (where.device, where.provider, json.dumps(dict(where.options)), where.threads, where.onnxruntime)
            row = (digest, *names, where.level, where.clock, where.lowered_by)
            self._write("INSERT OR IGNORE INTO circumstances VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
            self._known.add(digest)
        latency = (record.key, digest, record.kind, record.what, record.ms, record.samples, record.reason)
        row = (*latency, record.measured, int(record.disturbed))
        self._write("INSERT OR REPLACE INTO latency VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)

    def circumstances(self) -> list[Circumstances]:
        """All there are latencies of, sorted."""
        names = "device, provider, options, threads, onnxruntime, level, clock, lowered_by"
        rows = self._connection.execute(f"SELECT {names} FROM circumstances")  # noqa: S608 - a constant
        return sorted(
            Circumstances(device, provider, tuple(sorted(json.loads(options).items())), *others)
            for device, provider, options, *others in rows
        )

    def records(self, where: Circumstances) -> list[Record]:
        """Everything timed under these circumstances, by kind and key."""
        query = f"SELECT {_FIELDS} FROM latency WHERE circumstances = ? ORDER BY kind, key"  # noqa: S608 - a constant
        return [_record(row) for row in self._connection.execute(query, (where.digest,))]

    def fact(self, key: str) -> str | None:
        """Something learnt about a machine or a model, or None."""
        row = self._connection.execute("SELECT value FROM fact WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def put_fact(self, key: str, value: str) -> None:
        """Remember something learnt about a machine or a model."""
        self._write("INSERT OR REPLACE INTO fact VALUES (?, ?, ?)", (key, value, time.time()))

    def forget(self, where: Circumstances, *, disturbed: bool) -> int:
        """Remove the latencies of these circumstances, or the disturbed ones among them; returns how many."""
        query = "DELETE FROM latency WHERE circumstances = ? AND disturbed >= ?"
        return int(self._connection.execute(query, (where.digest, int(disturbed))).rowcount)

    @contextlib.contextmanager
    def as_one(self) -> Generator[None]:
        """Everything that is put meanwhile is kept, or, where an exception leaves the block, nothing of it.

        Raises:
            InputError: if the file cannot be written.
        """
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            self._whole = True
            yield
            self._connection.execute("COMMIT")
        except BaseException as error:
            if self._connection.in_transaction:  # SQLite itself rolls back where the disk is full
                self._connection.execute("ROLLBACK")
            self._known.clear()
            if not isinstance(error, sqlite3.Error):
                raise
            got = f"{self.path}, which cannot be written ({error})"
            raise InputError(got, "a latency table that can be", f"free the disk, or set {CACHE_VARIABLE}") from error
        finally:
            self._whole = False

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def _write(self, statement: str, row: tuple[object, ...]) -> None:
        try:
            self._connection.execute(statement, row)
        except sqlite3.OperationalError as error:  # disk full, or locked for longer than the time-out: it is a cache
            if self._whole:
                raise
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


_FIELDS = "key, what, median_ms, samples, kind, reason, measured, disturbed"  # in the order of `Record`


def _record(row: tuple[Any, ...]) -> Record:
    *fields, disturbed = row
    return Record(*fields, disturbed=bool(disturbed))


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
    if version == 2:  # nothing was said then about what disturbed a measurement
        _add_disturbed(connection)
    elif version not in {0, _SCHEMA}:
        raise sqlite3.DatabaseError(f"schema {version}, expected {_SCHEMA}")
    if version == 0:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(_CREATE)
    connection.execute("PRAGMA synchronous = NORMAL")
    state = connection.execute("PRAGMA quick_check").fetchone()[0]
    if state != "ok":
        raise sqlite3.DatabaseError(state)


def _add_disturbed(connection: sqlite3.Connection) -> None:
    """Bring a table of schema 2 to 3, unless another process has."""
    connection.execute("BEGIN IMMEDIATE")
    if not any(row[1] == "disturbed" for row in connection.execute("PRAGMA table_info(latency)")):
        connection.execute("ALTER TABLE latency ADD COLUMN disturbed INTEGER NOT NULL DEFAULT 0")
    connection.execute(f"PRAGMA user_version = {_SCHEMA}")
    connection.execute("COMMIT")
