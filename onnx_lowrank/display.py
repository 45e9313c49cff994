"""What a terminal shows while a job runs, and tables that belong to no other room."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from onnx_lowrank.catalogue import catalogue
from onnx_lowrank.plan import Plan
from onnx_lowrank.progress import Advance, Phases
from onnx_lowrank.report.latency_columns import LatencyColumns


def phases_on(console: Console) -> Phases:
    """Phases shown as progress bars, or not at all where `console` is no terminal."""
    if not console.is_terminal:
        return Phases()

    @contextlib.contextmanager
    def bar(name: str) -> Generator[Advance]:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(name, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)

    return Phases(bar)


def catalogue_table() -> Table:
    """Every pass and decomposition with its options and one line of description."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("name", "kind", "options", "what it does"):
        table.add_column(name)
    for entry in catalogue():
        options = ", ".join(f"{option.name}={option.default} ({option.kind})" for option in entry.options)
        what = f"{entry.description} Only by name: {entry.on_request}." if entry.on_request else entry.description
        table.add_row(escape(entry.name), entry.kind, escape(options), escape(what))
    return table


def plan_table(plan: Plan) -> Table:
    """What every layer that does not stay as it is becomes, and what that is said to take."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("layer", overflow="fold")
    for name in ("becomes", "rank"):
        table.add_column(name)
    table.add_column("error", justify="right")
    changed = [choice for choice in plan.layers if not choice.keeps]
    latencies = LatencyColumns.added_to(table, [choice.source for choice in changed])
    for choice in changed:
        ms = "" if choice.predicted_ms is None else f"{choice.predicted_ms:.3g}"
        rank = "x".join(map(str, choice.rank))
        cells = latencies.cells(choice.source, ms)
        table.add_row(escape(choice.node), choice.method, rank, f"{choice.predicted_error:.3f}", *cells)
    return table
