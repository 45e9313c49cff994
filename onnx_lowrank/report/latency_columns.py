"""Measured and estimated milliseconds stand in columns of their own, so that nobody compares one with the other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.table import Table

from onnx_lowrank.plan import ESTIMATED, MEASURED

_HEADERS = {MEASURED: "ms", ESTIMATED: "ms (estimated)"}


@dataclass(frozen=True)
class LatencyColumns:
    """The last columns of a table, one per source of latencies that occurs in it; that of measured ones without any.

    Args:
        sources: In order of the columns.
    """

    sources: tuple[str, ...]

    @staticmethod
    def added_to(table: Table, sources: Iterable[str | None]) -> LatencyColumns:
        """Add the columns that rows of these sources need."""
        found = set(sources)
        columns = LatencyColumns(tuple(source for source in _HEADERS if source in found) or (MEASURED,))
        for source in columns.sources:
            table.add_column(_HEADERS[source], justify="right", overflow="fold", no_wrap=True)
        return columns

    def cells(self, source: str | None, text: str) -> list[str]:
        """The last cells of a row: its latency in the column of its source."""
        return [text if source == own else "" for own in self.sources]
