"""The report as a person reads it: what each layer became and why, then before and after."""

from __future__ import annotations

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from onnx_lowrank.report.latency_columns import LatencyColumns
from onnx_lowrank.report.model import LayerRow, Loss, Report, Sampling

COLUMNS = ("layer", "op", "shape", "became", "rank", "error", "MACs")
NUMERIC = {"error", "MACs"}
NAMES_SHOWN = 4


def show(report: Report, console: Console) -> None:
    """Print the report."""
    if report.factorized:
        console.print(_factorized(report))
    for line in _kept(report):
        console.print(line, highlight=False)
    console.print()
    console.print(_summary(report))
    console.print(_closing(report))


def _factorized(report: Report) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in COLUMNS:
        table.add_column(name, justify="right" if name in NUMERIC else "left", overflow="fold", no_wrap=name in NUMERIC)
    rows = [row for row in report.layers if row.decision == "factorized"]
    latencies = LatencyColumns.added_to(table, [row.source for row in rows])
    for row in rows:
        table.add_row(
            escape(row.name),
            row.op,
            row.shape,
            Text(row.method, style="green"),
            "x".join(map(str, row.rank)),
            f"{row.error:.3f}" if row.error_refit is None else f"{row.error:.3f} -> {row.error_refit:.3f}",
            f"x{row.macs_after / row.macs_before:.2f}" if row.macs_before else "",
            *latencies.cells(row.source, _before_after(row.latency_ms_before, row.latency_ms_after)),
        )
    return table


def _kept(report: Report) -> list[Text]:
    """Kept nodes, those with the same reason on one line; figures of single nodes are in report.json."""
    groups: dict[str, list[LayerRow]] = {}
    for row in report.layers:
        if row.decision != "factorized":
            groups.setdefault(row.reason.partition(" (")[0], []).append(row)
    lines: list[Text] = []
    for reason, rows in groups.items():
        names = ", ".join(row.name for row in rows[:NAMES_SHOWN])
        more = f" and {len(rows) - NAMES_SHOWN} more" if len(rows) > NAMES_SHOWN else ""
        lines.append(
            Text("kept ", style="dim").append(names + more, style="default").append(f": {reason}", style="dim")
        )
    return lines


def _summary(report: Report) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("", "before", "after", "change", "95 % interval"):
        table.add_column(name, justify="left" if not name else "right")
    if report.latency is not None:
        time, low = report.latency, report.latency.low_rank_ci95
        table.add_row(
            f"latency (ms, {time.clock})",
            f"{time.before_ms:.3f}",
            f"{time.after_ms:.3f}",
            f"{time.speedup:.2f}x",
            _span(time.ci95),
        )
        table.add_row(
            "  by low rank alone",
            f"{time.normalized_ms:.3f}",
            f"{time.after_ms:.3f}",
            f"{time.low_rank_speedup:.2f}x",
            _span(low),
        )
        table.add_row("  predicted", "", f"{time.predicted_ms:.3f}", f"{time.predicted_low_rank_speedup:.2f}x", "")
    if report.accuracy is not None:
        score = report.accuracy
        table.add_row(
            f"{score.metric} ({score.samples} samples)",
            f"{score.before:.4f}",
            f"{score.after:.4f}",
            f"{score.after - score.before:+.4f}",
            _span(score.ci95, signed=True),
        )
    size = report.size
    for name, before, after in (
        ("parameters", size.params_before, size.params_after),
        ("MACs", size.macs_before, size.macs_after),
        ("file (bytes)", size.bytes_before, size.bytes_after),
    ):
        table.add_row(name, f"{before:,.0f}", f"{after:,.0f}", f"{after / before:.2f}" if before else "", "")
    return table


def _closing(report: Report) -> Group:
    goal, fidelity = report.goal, report.fidelity
    verdict = Text("goal reached" if goal.reached else "goal NOT reached", style="green" if goal.reached else "red")
    lines = [
        verdict.append(f": {goal.kind} {goal.value:g}; {goal.reason}", style="default"),
        Text(
            f"relative error of the outputs {fidelity['relative_error']:.3g} on {fidelity['samples']} "
            f"{fidelity['data']} samples; {report.calibration}; training: {report.training}"
        ),
        Text(
            f"{report.factorized} of {len(report.layers)} weight-bearing nodes factorized; "
            f"{report.chains_timed} chains timed on {report.environment['cpu']}, {report.target['threads']} thread(s), "
            f"provider {report.environment['provider']}; {sum(report.timings.values()):.0f} s, "
            f"{'peak memory not known' if report.peak_rss_mib is None else f'{report.peak_rss_mib:.0f} MiB'}"
        ),
    ]
    if report.samples is not None:
        lines.append(_samples(report.samples))
    if report.loss is not None and report.loss.without_refit is not None:
        lines.append(_losses(report.loss, report.loss.without_refit))
    if report.latency is not None and report.latency.disturbed:
        lines.append(Text("the machine was busy while timing: take the intervals seriously", style="yellow"))
    if report.bisect is not None:
        blame = report.bisect
        what = f"{blame.node}: {blame.rewrite}" if blame.node else blame.rewrite
        lines.append(
            Text(
                f"bisect: {what} takes the error from {blame.error_before:.3g} to {blame.error_after:.3g} "
                f"(tolerance {blame.tolerance:g})"
            )
        )
    lines.extend(Text(f"note: {note}", style="yellow") for note in report.notes)
    return Group(*lines)


def _samples(samples: Sampling) -> Text:
    """Where they came from and what they were for."""
    of = "" if samples.sources is None else f" of {samples.sources} sources"
    parts = f"{samples.fitted} fitted on, {samples.judged} judging, {samples.held_out} held out"
    most = max(samples.positions.values(), default=0)
    rows = f"; at most {most:,} positions a layer, drawn by a fixed seed" if most else ""
    return Text(f"samples{of} from {samples.origin}: {parts}{rows}")


def _losses(loss: Loss, without_refit: float) -> Text:
    """How well predicted and measured losses agree."""
    times = "" if loss.agreement is None else f", {loss.agreement:.2g} times what was predicted"
    return Text(
        f"loss of the outputs {loss.predicted:.3g} predicted and {without_refit:.3g} measured on the same "
        f"{loss.judged_on} samples, both without refit{times}; "
        f"{loss.measured:.3g} of the written model on {loss.samples} held-out samples"
    )


def _before_after(before: float | None, after: float | None) -> str:
    return "" if before is None or after is None else f"{before:.3g} -> {after:.3g}"


def _span(interval: tuple[float, float], *, signed: bool = False) -> str:
    low, high = interval
    return f"{low:+.4f} to {high:+.4f}" if signed else f"{low:.2f} to {high:.2f}"
