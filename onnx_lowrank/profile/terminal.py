"""A benchmark as a person reads it: every file under every set of conditions, then where the time goes.

The breakdown is that of the first race; those of the others are in the JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from onnx_lowrank.profile.model import Failure, ModelProfile, Profile, TimeShare

Column = tuple[str, Callable[[ModelProfile], str]]
Parts = Callable[[ModelProfile], Sequence[TimeShare]]
_TAIL_RUNS = 100


def render(result: Profile, console: Console, shown: int = 10) -> None:
    """Print the comparison, and the `shown` most expensive layers and operators."""
    varying, races = _varying(result), result.races()
    latency = _LATENCY if result.comparisons else _LATENCY[:-1]
    first = races[0]
    levels = ", ".join(dict.fromkeys(row.level for row in first))
    conditions = ", ".join([*(f"{heading} {text(first[0])}" for heading, text in varying), f"level {levels}"])
    for title, table in (
        (_title(result), _table(races, [*varying, *latency])),
        ("throughput, loading, memory", _table(races, [*varying, *_COST])),
        (f"where the time goes, by layer: {conditions}", _where(first, "layer", lambda row: row.layers, shown)),
        (f"by operator: {conditions}", _where(first, "operator", lambda row: row.operators, shown)),
    ):
        console.print(escape(title), highlight=False, soft_wrap=True, style="italic")
        console.print(table)
        console.print()
    if result.provider != "cpu":
        console.print("where it runs", highlight=False, style="italic")
        console.print(_placement(result))
        console.print()
    for line in _remarks(result, varying):
        console.print(escape(line), highlight=False, soft_wrap=True)


def _table(races: Sequence[Sequence[ModelProfile]], columns: Sequence[Column]) -> Table:
    table = _empty("model")
    for heading, _ in columns:
        table.add_column(heading, justify="right", overflow="fold")
    for row in (row for race in races for row in race):
        table.add_row(escape(Path(row.path).name), *(escape(text(row)) for _, text in columns))
    return table


def _placement(result: Profile) -> Table:
    table = _empty("model")
    for heading in ("provider", "nodes", "operators"):
        table.add_column(heading, justify="right" if heading == "nodes" else "left", overflow="fold")
    for path, rows in {model.path: model.placement for model in result.models}.items():
        for row in rows:
            listed = ", ".join(f"{count} {op}" for op, count in row.operators.items())
            table.add_row(escape(Path(path).name), row.provider, str(row.nodes), escape(listed))
        if not rows:
            table.add_row(escape(Path(path).name), "unknown: onnxruntime before 1.24 does not tell", "", "")
    return table


def _empty(first: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(first, overflow="fold")
    return table


def _title(result: Profile) -> str:
    threads = ",".join(dict.fromkeys(str(row.threads) for row in result.models))
    clock = "wall clock" if result.clock == "wall" else f"{result.clock} clock (p95, p99: wall clock)"
    return f"{result.provider}, {threads} thread(s), at least {result.rounds} rounds in turns, {clock}"


def _varying(result: Profile) -> list[Column]:
    """The conditions that differ between the rows of one model."""
    candidates: list[Column] = [
        ("threads", lambda row: str(row.threads)),
        ("batch", lambda row: str(row.batch)),
        ("inputs", _sizes),
    ]
    found = [column for column in candidates if len({column[1](row) for row in result.models}) > 1]
    sizes, batches = len({_sizes(row) for row in result.models}), len({row.batch for row in result.models})
    # One of the two says it all: the batch where only it was swept, the shapes where it was not.
    spare = ("inputs" if sizes == batches else "") if result.sweep["batch"] else "batch"
    return [column for column in found if column[0] != spare]


def _ratio(row: ModelProfile) -> str:
    low, high = row.ratio_ci95
    return f"{row.ratio:.2f}x [{low:.2f}, {high:.2f}]"


def _median(row: ModelProfile) -> str:
    low, high = row.p50_ci95_ms
    return f"{row.p50_ms:.3f} ±{(high - low) / 2 / row.p50_ms:.1%}"


def _tail(percentile_ms: float | None) -> str:
    return "not enough runs" if percentile_ms is None else f"{percentile_ms:.3f}"


def _megabytes(count: int | None) -> str:
    return "not measured" if count is None else f"{count / 1e6:.1f}"


def _sizes(row: ModelProfile | Failure) -> str:
    return " ".join(f"{name}={'x'.join(map(str, shape)) or 'scalar'}" for name, shape in row.shapes.items())


_LATENCY: tuple[Column, ...] = (
    ("level", lambda row: row.level),
    ("p50 ms", _median),
    ("p95 ms", lambda row: _tail(row.p95_ms)),
    ("p99 ms", lambda row: _tail(row.p99_ms)),
    ("faster than first", _ratio),
)
_COST: tuple[Column, ...] = (
    ("level", lambda row: row.level),
    ("samples/s", lambda row: f"{row.throughput:.4g}"),
    ("load s", lambda row: f"{row.load_s:.2f}"),
    ("peak host MB", lambda row: _megabytes(row.peak_memory_bytes)),
    ("file MB", lambda row: f"{row.size_bytes / 1e6:.2f}"),
)


def _where(race: Sequence[ModelProfile], heading: str, parts: Parts, shown: int) -> Table:
    """Every model of a race beside the first one."""
    table = _empty(heading)
    for position, row in enumerate(race):
        table.add_column(f"{escape(Path(row.path).name)} ms", justify="right", overflow="fold")
        table.add_column("share", justify="right")
        if position:
            table.add_column("faster", justify="right")
    found = [{entry.name: entry for entry in parts(row)} for row in race]
    names = list(dict.fromkeys(name for entries in found for name in entries))
    for name in names[:shown]:
        table.add_row(escape(name), *_beside([entries.get(name) for entries in found]))
    if rest := names[shown:]:
        label = f"{len(rest)} more"
        sums = [_sum(label, [entries[name] for name in rest if name in entries]) for entries in found]
        table.add_row(label, *_beside(sums))
    total = _beside([TimeShare("total", 1.0, row.p50_ms) for row in race])
    total[4::3] = [f"{row.ratio:.2f}x" for row in race[1:]]  # of the paired runs, which the medians' ratio is not
    table.add_row("total", *total)
    return table


def _sum(name: str, entries: Sequence[TimeShare]) -> TimeShare:
    return TimeShare(name, sum(entry.share for entry in entries), sum(entry.ms for entry in entries))


def _beside(entries: Sequence[TimeShare | None]) -> list[str]:
    """Milliseconds and share of each, and how many times as fast it is as the first from the second on."""
    cells: list[str] = []
    for position, entry in enumerate(entries):
        cells += ["", ""] if entry is None else [f"{entry.ms:.3f}", f"{entry.share:.1%}"]
        if position:
            first = entries[0]
            cells.append(f"{first.ms / entry.ms:.2f}x" if first and entry and entry.ms > 0 else "")
    return cells


def _remarks(result: Profile, varying: Sequence[Column]) -> list[str]:
    """Under what conditions the figures hold, and what they do not say."""
    lines = [_conditions(result), "Milliseconds of layers and operators are the profiler's shares of the p50."]
    races = result.races()
    if len(races) > 1:
        lines.append(f"Where the time goes in the other races ({len(races) - 1}): see --json or -o.")
    if (fewest := min(row.runs for row in result.models)) < _TAIL_RUNS:
        said = "no p95 or p99" if any(row.p99_ms is None for row in result.models) else "a p99 close to the slowest one"
        lines.append(f"Of {fewest} runs there is {said}; --seconds gives more.")
    lines += result.notes
    if result.synthetic:
        lines.append("Inputs are synthetic: drawn to fit the signature.")
    for row in (race[0] for race in races if race[0].disturbed):
        where = ", ".join([*(f"{heading} {text(row)}" for heading, text in varying), f"level {row.level}"])
        lines.append(f"The machine was busy ({where}): times scatter or drift. Time again on a quieter one.")
    return [*lines, *map(_failed, result.failures)]


def _failed(failure: Failure) -> str:
    conditions = f"threads {failure.threads}, batch {failure.batch}, inputs {_sizes(failure)}"
    levels = " or ".join(failure.levels)
    return f"{Path(failure.path).name} was not timed ({conditions}, level {levels}): {failure.reason}"


def _conditions(result: Profile) -> str:
    found = result.environment
    options = found["provider_options"]
    listed = ", ".join(f"{key}={value}" for key, value in options.items()) if isinstance(options, dict) else ""
    versions = found["versions"]
    runtime = versions["onnxruntime"] if isinstance(versions, dict) else "?"
    return (
        f"Timed on {found['cpu']}, onnxruntime {runtime}, provider {result.provider} ({listed or 'provider defaults'})."
    )
