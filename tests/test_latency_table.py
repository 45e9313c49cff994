"""The table that remembers: written by several processes, damaged, of an older schema, forgotten in part."""

from __future__ import annotations

import multiprocessing
import sqlite3
from pathlib import Path

import pytest

from onnx_lowrank.latency.circumstances import Circumstances
from onnx_lowrank.latency.table import CACHE_VARIABLE, LatencyTable, Record, cache_folder
from onnx_lowrank.target import Target

HERE = Circumstances.here(Target(threads=1))


def write_rows(path: Path, first: int, rows: int) -> None:
    with LatencyTable(path) as table:
        for number in range(first, first + rows):
            table.put(HERE, Record(f"key{number}", "conv", float(number), 7))


def ms(table: LatencyTable, where: Circumstances = HERE, key: str = "a") -> float | None:
    record = table.record(key, where)
    return None if record is None else record.ms


def test_two_processes_write_at_once(tmp_path: Path):
    path = tmp_path / "t.sqlite"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=write_rows, args=(path, first, 300)) for first in (0, 200)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    with LatencyTable(path) as table:
        assert len(table) == 500
        assert [ms(table, key=f"key{number}") for number in (0, 250, 499)] == [0.0, 250.0, 499.0]


def test_a_table_replaces_what_it_holds(tmp_path: Path):
    with LatencyTable(tmp_path / "deep" / "t.sqlite") as table:
        assert ms(table) is None
        table.put(HERE, Record("a", "conv", 1.5, 7))
        table.put(HERE, Record("a", "conv", 2.5, 7))
        assert (ms(table), len(table)) == (2.5, 1)
        assert table.fact("block") is None
        table.put_fact("block", "16")
        assert table.fact("block") == "16"


def damaged(path: Path) -> None:
    path.write_bytes(b"this is no database" * 400)


def test_a_table_of_before_is_gone_on_with(tmp_path: Path):
    path = tmp_path / "t.sqlite"
    write_rows(path, 0, 1)
    with sqlite3.connect(path) as connection:
        connection.execute("ALTER TABLE latency DROP COLUMN disturbed")
        connection.execute("PRAGMA user_version = 2")
    for _ in range(2):
        with LatencyTable(path) as table:
            assert table.record("key0", HERE) is not None
            table.put(HERE, Record("a", "conv", 1.0, 7, disturbed=True))
            found = table.record("a", HERE)
            assert found is not None
            assert found.disturbed is True
    assert not list(tmp_path.glob("*.unusable-*"))
    with sqlite3.connect(path) as connection:  # a process that was killed between the two steps
        connection.execute("PRAGMA user_version = 2")
    with LatencyTable(path) as table:
        assert len(table) == 2
        assert table.path == path
        assert table.record("a", HERE) is not None


def test_what_was_disturbed_can_be_forgotten_alone(tmp_path: Path):
    with LatencyTable(tmp_path / "t.sqlite") as table:
        table.put(HERE, Record("a", "conv", 1.0, 7, disturbed=True))
        table.put(HERE, Record("b", "conv", 1.0, 7))
        table.put(HERE.at("extended"), Record("a", "conv", 1.0, 7, disturbed=True))
        assert table.forget(HERE, disturbed=True) == 1
        assert [record.key for record in table.records(HERE)] == ["b"]
        assert table.forget(HERE, disturbed=False) == 1
        assert len(table) == 1


def truncated(path: Path) -> None:
    write_rows(path, 0, 2000)
    path.write_bytes(path.read_bytes()[:5000])


def other_schema(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")


@pytest.mark.parametrize("harm", [damaged, truncated, other_schema])
def test_unusable_file_is_moved_aside(tmp_path: Path, caplog, harm):
    path = tmp_path / "t.sqlite"
    harm(path)
    with LatencyTable(path) as table:
        table.put(HERE, Record("a", "conv", 1.0, 7))
        assert len(table) == 1
    assert len(list(tmp_path.glob("t.sqlite.unusable-*"))) == 1
    assert "is unusable" in caplog.text
    with LatencyTable(path) as table:
        assert ms(table) == 1.0


def test_unwritable_folder_means_memory(tmp_path: Path, caplog):
    (tmp_path / "file").write_text("in the way")
    with LatencyTable(tmp_path / "file" / "t.sqlite") as table:
        table.put(HERE, Record("a", "conv", 1.0, 7))
        assert ms(table) == 1.0
    assert "measurements are not kept" in caplog.text


def test_cache_folder_can_be_moved(tmp_path: Path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    assert cache_folder() == tmp_path
    with LatencyTable() as table:
        assert table.path == tmp_path / "latency.sqlite"
