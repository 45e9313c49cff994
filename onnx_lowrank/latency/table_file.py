"""Latency tables as files: JSON, circumstances spelled out, so that what was measured there can be used here.

A file holds one section per circumstances: `circumstances`, `channel_blocks` learnt under them, and `records`, one per
chain or model, each {key, what, kind, ms, samples, reason, measured, disturbed}. `on_target.py` writes the same but for
`disturbed`, which it does not judge.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from onnx_lowrank.errors import InputError
from onnx_lowrank.latency.circumstances import Circumstances
from onnx_lowrank.latency.grid import KINDS, Kind, known_block, remember_block
from onnx_lowrank.latency.table import CHAIN, MODEL, LatencyTable, Record

SCHEMA = 1
LARGEST, MOST_SAMPLES = 4096, 1 << 31  # of a channel block; of the rounds of one latency
_AGAIN = "export it again with `onnx-lowrank latency export`, or run measure.py again"


@dataclass(frozen=True)
class Section:
    """What was measured under the same circumstances.

    Args:
        where: The circumstances.
        records: Latencies, by kind and key.
        blocks: Channel blocks, of the kinds of operators that were probed.
    """

    where: Circumstances
    records: Sequence[Record]
    blocks: dict[Kind, int] = field(default_factory=dict[Kind, int])

    @property
    def models(self) -> int:
        """How many whole models were timed."""
        return sum(record.kind == MODEL and record.ms is not None for record in self.records)

    @property
    def chains(self) -> int:
        """How many chains and layers were timed."""
        return sum(record.kind == CHAIN and record.ms is not None for record in self.records)

    @property
    def dropped(self) -> int:
        """How many could not be timed."""
        return sum(record.ms is None for record in self.records)

    @property
    def disturbed(self) -> int:
        """How many were timed beside other work."""
        return sum(record.disturbed for record in self.records)

    @property
    def measured(self) -> tuple[str, str]:
        """First and last day of measuring, 2026-11-22."""
        times = [record.measured for record in self.records] or [0.0]
        return day(min(times)), day(max(times))

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        records = [
            {**record.__dict__, "measured": datetime.fromtimestamp(record.measured, UTC).isoformat()}
            for record in self.records
        ]
        return {"circumstances": self.where.to_dict(), "channel_blocks": self.blocks, "records": records}


@dataclass(frozen=True)
class Merged:
    """What became of a section: how many of its latencies were new, and how many had been there."""

    where: Circumstances
    new: int
    known: int


def day(moment: float) -> str:
    """2026-11-22, in UTC."""
    return datetime.fromtimestamp(moment, UTC).date().isoformat()


def sections(table: LatencyTable, wanted: Callable[[Circumstances], bool] = lambda _: True) -> list[Section]:
    """What a table holds, of the wanted circumstances."""
    return [
        Section(where, table.records(where), _blocks(table, where)) for where in table.circumstances() if wanted(where)
    ]


def to_json(content: Iterable[Section]) -> str:
    """The file's text, the same for the same content."""
    return json.dumps({"schema": SCHEMA, "tables": [section.to_dict() for section in content]}, indent=1) + "\n"


def merge(table: LatencyTable, content: Iterable[Section]) -> list[Merged]:
    """Put sections into a table, all or none, each under its circumstances; of latencies in both, the newer stay."""
    with table.as_one():
        return [_merged(table, section) for section in content]


def read(path: Path) -> list[Section]:
    """Read a file.

    Raises:
        InputError: if it cannot be read, is damaged, or of another schema; names the field at fault.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path} that is not JSON ({error})", "a latency table", _AGAIN) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} ({error})", "a readable latency table", "check the path") from error
    if not isinstance(raw, dict) or "tables" not in raw:
        raise InputError(f"{path}, which holds no latencies", "a latency table", _AGAIN)
    if raw.get("schema") != SCHEMA:
        raise InputError(f"schema {raw.get('schema')!r} in {path}", f"schema {SCHEMA}", _AGAIN)
    try:
        return [_section(part) for part in raw["tables"]]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        detail = f"{type(error).__name__}: {error}"
        raise InputError(f"{path} with a bad field ({detail})", "a latency table", _AGAIN) from error


def _merged(table: LatencyTable, section: Section) -> Merged:
    before = {record.key: record.measured for record in table.records(section.where)}
    for record in section.records:
        if record.measured > before.get(record.key, -math.inf):
            table.put(section.where, record)
    known = sum(record.key in before for record in section.records)
    for kind, block in section.blocks.items():
        if known_block(section.where, table, kind) is None:
            remember_block(section.where, table, kind, block)
    return Merged(section.where, len(section.records) - known, known)


def _section(raw: dict[str, Any]) -> Section:
    where = Circumstances.from_dict(raw["circumstances"])
    told = raw["channel_blocks"]
    blocks: dict[Kind, Any] = {kind: told[kind] for kind in KINDS if kind in told}
    for kind, block in blocks.items():
        if not isinstance(block, int) or isinstance(block, bool) or not 1 <= block <= LARGEST:
            raise ValueError(f"channel block {block!r} of {kind}")
    return Section(where, [_record(item) for item in raw["records"]], blocks)


def _record(raw: dict[str, Any]) -> Record:
    what, ms, samples, kind = str(raw["what"]), raw["ms"], raw["samples"], raw["kind"]
    if ms is not None and not (_is_number(ms) and 0 < ms < math.inf):
        raise ValueError(f"ms {ms!r} of {what}")
    if kind not in {CHAIN, MODEL}:
        raise ValueError(f"kind {kind!r} of {what}")
    if not isinstance(samples, int) or not 0 <= samples <= MOST_SAMPLES:
        raise ValueError(f"samples {samples!r} of {what}")
    measured = datetime.fromisoformat(str(raw["measured"])).timestamp()
    disturbed = raw.get("disturbed", False)  # which measure.py does not judge
    if not isinstance(disturbed, bool):
        raise TypeError(f"disturbed {disturbed!r} of {what}")
    price = None if ms is None else float(ms)
    return Record(str(raw["key"]), what, price, samples, str(kind), str(raw["reason"]), measured, disturbed)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _blocks(table: LatencyTable, where: Circumstances) -> dict[Kind, int]:
    found: dict[Kind, int | None] = {kind: known_block(where, table, kind) for kind in KINDS}
    return {kind: block for kind, block in found.items() if block is not None}
