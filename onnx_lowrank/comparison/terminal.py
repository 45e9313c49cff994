"""A comparison as a person reads it: per budget the layers, format by format, then the whole networks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from onnx_lowrank.comparison.model import Comparison, Contender, LayerComparison, NetworkComparison

NAMES_SHOWN = 3
FRONT, BEYOND = "*", "!"
COLUMNS = ("format", "rank", "error", "params", "MACs", "time", "95 % interval", "")


def render(found: Comparison, console: Console) -> None:
    """Print it."""
    for budget in found.budgets:
        console.print(f"Layers at {budget.words} of each", style="bold")
        for part in _layers(found.layers, str(budget)):
            console.print(part, highlight=False)
        for line in _missing(found.layers, str(budget)):
            console.print(line, highlight=False, soft_wrap=True)
        console.print()
    for line in _refused(found.layers):
        console.print(line, highlight=False, soft_wrap=True)
    for budget in found.budgets:
        console.print()
        console.print(f"The network at {budget.words}", style="bold")
        rows = [row for row in found.networks if row.budget == str(budget)]
        console.print(_networks(found, rows))
        for row in rows:
            if not row.reached:
                console.print(Text(f"{row.name}: {row.reason}", style="dim"), highlight=False, soft_wrap=True)
    console.print()
    for line in _closing(found):
        console.print(line, highlight=False, soft_wrap=True)


def _layers(layers: Sequence[LayerComparison], budget: str) -> Iterator[Text | Table]:
    """A heading and a table per layer, all tables of the same widths: names of layers are long, screens are not."""
    rows = {layer.name: sorted(_within(layer, budget), key=lambda c: (c.error or 0.0, c.format)) for layer in layers}
    cells = {layer.name: [_cells(row, layer) for row in rows[layer.name]] for layer in layers}
    every = [[str(cell) for cell in row] for mine in cells.values() for row in mine]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *every, strict=True)]
    for layer in (layer for layer in layers if rows[layer.name]):
        own = "" if layer.ms is None else f", {layer.ms:.3g} ms"
        yield Text(f"{layer.name}  {layer.op} {layer.shape}{own}, error of its {layer.metric}")
        table = Table(box=None, header_style="dim", pad_edge=False)
        for number, (name, width) in enumerate(zip(COLUMNS, widths, strict=True)):
            table.add_column(name, justify="left" if number < 2 else "right", min_width=width, no_wrap=True)
        for row in cells[layer.name]:
            table.add_row(*row)
        yield table


def _within(layer: LayerComparison, budget: str) -> list[Contender]:
    return [row for row in layer.contenders if row.budget == budget and row.rank]


def _cells(row: Contender, layer: LayerComparison) -> tuple[str | Text, ...]:
    return (
        Text(row.format, style="green" if row.front else ""),
        "x".join(map(str, row.rank)),
        f"{row.error:.3f}",
        f"x{(row.params or 0) / layer.params:.2f}",
        f"x{(row.macs or 0) / layer.macs:.2f}" if layer.macs else "",
        "" if row.of_layer is None else f"x{row.of_layer:.2f}",
        "" if row.ci95 is None else f"{row.ci95[0]:.2f} to {row.ci95[1]:.2f}",
        (FRONT if row.front else "") + (BEYOND if row.beyond else ""),
    )


def _missing(layers: Sequence[LayerComparison], budget: str) -> Iterator[Text]:
    """Formats that take a layer but do not come within the budget, each once."""
    found: dict[str, list[tuple[str, str]]] = {}
    for layer in layers:
        for row in layer.contenders:
            if row.budget == budget and not row.rank:
                found.setdefault(row.format, []).append((layer.name, row.reason))
    return _said(found, "does not reach it on")


def _refused(layers: Sequence[LayerComparison]) -> Iterator[Text]:
    found: dict[str, list[tuple[str, str]]] = {}
    for layer in layers:
        for name, sentence in layer.refusals.items():
            found.setdefault(name, []).append((layer.name, sentence))
    return _said(found, "refuses")


def _said(found: dict[str, list[tuple[str, str]]], verb: str) -> Iterator[Text]:
    """A line per format: how many layers, which, and the first reason as an example."""
    for name, cases in found.items():
        names = ", ".join(layer for layer, _ in cases[:NAMES_SHOWN])
        more = f" and {len(cases) - NAMES_SHOWN} more" if len(cases) > NAMES_SHOWN else ""
        yield Text(f"{name} {verb} {names}{more}: {cases[0][1]}", style="dim")


def _networks(found: Comparison, rows: Sequence[NetworkComparison]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("formats", no_wrap=True)
    metric = next((row.accuracy.metric for row in found.networks if row.accuracy is not None), None)
    change = [] if metric is None else [metric, "change, 95 %"]
    for name in ("layers", "error", *change, "params", "MACs", "ms", "speedup", "95 % interval"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    built = [row for row in rows if row.relative_error is not None]
    for row in sorted(built, key=lambda row: (row.relative_error or 0.0, row.name)):
        score = row.accuracy
        cells = () if metric is None else ("", "")
        if score is not None:
            cells = (f"{score.after:.4f}", f"{score.ci95[0]:+.4f} to {score.ci95[1]:+.4f}")
        low, high = row.ci95 or (0.0, 0.0)
        table.add_row(
            Text(row.name, style="green" if row.front else ""),
            str(sum(row.used.values())),
            f"{row.relative_error:.3g}",
            *cells,
            f"x{(row.params or 0) / max(found.params, 1):.2f}",
            f"x{(row.macs or 0) / max(found.macs, 1):.2f}",
            f"{row.ms:.3g}",
            f"{row.speedup:.2f}x",
            f"{low:.2f} to {high:.2f}",
            FRONT if row.front else "",
        )
    return table


def _closing(found: Comparison) -> Iterator[Text]:
    for row in found.networks:
        if row.same_as:
            yield Text(f"{row.name} at {row.budget} is the network of {row.same_as}")
    for row in (row for row in found.networks if len(row.used) > 1 and not row.same_as):
        used = ", ".join(f"{name} {count}" for name, count in sorted(row.used.items(), key=lambda item: -item[1]))
        yield Text(f"{row.name} at {row.budget} chose {used}")
    fitted = any(layer.metric == "outputs" for layer in found.layers)
    on = "; their errors are on the samples they were fitted to" if fitted else ""
    yield Text(
        f"{FRONT}: nothing compared has as little error in less time. Layers: chains alone, timed in turns with their "
        f"layer, before any refit{on}"
    )
    if any(row.beyond for layer in found.layers for row in layer.contenders):
        yield Text(f"{BEYOND}: within the budget when it was chosen, beyond it when timed again")
    yield Text(
        f"{found.data}; {found.environment['cpu']}, {found.target['threads']} thread(s), "
        f"provider {found.environment['provider']}; {sum(found.timings.values()):.0f} s"
    )
    if any(row.disturbed for row in found.networks):
        yield Text("the machine was busy while timing: take the intervals seriously", style="yellow")
    for note in found.notes:
        yield Text(f"note: {note}", style="yellow")
