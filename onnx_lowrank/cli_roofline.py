"""The commands for devices nobody measured: rooflines fitted to tables, and estimates from data sheets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from onnx_lowrank import output
from onnx_lowrank.cli_latency import TableArgument, app
from onnx_lowrank.cli_options import DeviceOption, JsonOption, ProviderOption, ThreadsOption
from onnx_lowrank.errors import InputError
from onnx_lowrank.graph import io
from onnx_lowrank.latency.circumstances import Circumstances
from onnx_lowrank.latency.estimates import ORIGIN, estimate_named, shipped
from onnx_lowrank.latency.grid import KINDS, Kind, known_block
from onnx_lowrank.latency.roofline import OP_CLASSES, Roofline, kind_of
from onnx_lowrank.latency.roofline_fit import Errors, Timed, cross_validated, fit
from onnx_lowrank.latency.table import CHAIN, LatencyTable
from onnx_lowrank.latency.table_file import merge, read
from onnx_lowrank.latency.work import OpClass, read_work
from onnx_lowrank.recipe import Recipe
from onnx_lowrank.search.elsewhere import Choice, elsewhere
from onnx_lowrank.search.estimated import Estimated

UNPROBED_BLOCK = 16
_out = Console()
RooflineOption = Annotated[
    Path | None, typer.Option("--output", "-o", help="Receives the roofline, for `plan --estimate`.")
]


@app.command("fit")
def fit_(
    file: TableArgument = None,
    *,
    out: RooflineOption = None,
    device: DeviceOption = None,
    provider: ProviderOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fit a roofline to measured latencies, and say how well it foretells layers it has not seen."""
    if out is not None:
        output.check_paths(out, file)
    with LatencyTable() if file is None else LatencyTable.in_memory() as table:
        if file is not None:
            merge(table, read(file))
        source = "your latency table" if file is None else str(file)
        there = elsewhere(table, Choice(device, provider, (), threads), source, "measure a model there first")
        where, timed, silent = _timed(table, there.where)
        probed = {kind: known_block(where, table, kind) for kind in KINDS}
    errors = cross_validated(timed)
    blocks: dict[Kind, int] = {kind: probed[kind] or UNPROBED_BLOCK for kind in KINDS}
    made = replace(fit(timed, f"{where.label}, level {where.level}", blocks), origin=f"fitted to {errors}")
    if out is not None:
        io.write_text(out, made.to_json())
    if as_json:
        typer.echo(json.dumps({"roofline": asdict(made), "errors": asdict(errors), "skipped": silent}, indent=1))
        return
    _show(made, errors, timed)
    if silent:
        _say(f"{silent} latencies of an earlier version are left out: they do not say enough of what was timed")
    if assumed := ", ".join(kind for kind, block in probed.items() if block is None):
        _say(f"channel block of {assumed} not probed there: {UNPROBED_BLOCK} is assumed")
    if out is not None:
        _say(f"written to {out}; plan by it with `onnx-lowrank plan MODEL --estimate {out}`")


@app.command()
def estimates(*, as_json: JsonOption = False) -> None:
    """List the devices that `plan --estimate` knows by their data sheets; none of them was measured."""
    if as_json:
        typer.echo(json.dumps({name: asdict(roofline) for name, roofline in shipped().items()}, indent=1))
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("name")
    table.add_column("device")
    for name in ("float32 TFLOP/s", "float16 TFLOP/s", "GB/s"):
        table.add_column(name, justify="right")
    for name, line in shipped().items():
        peaks = (line.peak_flops["float32"], line.peak_flops["float16"])
        table.add_row(name, escape(line.device), *(f"{peak / 1e12:g}" for peak in peaks), f"{line.bandwidth / 1e9:g}")
    _out.print(table)
    _say(f"estimated {ORIGIN}, not measured; float32 as TensorFloat-32 where there is one")


def estimated_device(
    name: str | None, table: Path | None, device: str | None, asked: Recipe, options: Sequence[str]
) -> Estimated | None:
    """The device that a plan is made for by estimates, or None where none are asked for.

    Raises:
        InputError: if there is no such estimate, or something is asked for that estimates know nothing of.
    """
    if name is None:
        return None
    given = {"--table": table, "--device": device, "--provider": asked.provider, "--threads": asked.threads}
    idle = [option for option, value in (given | {"--provider-option": options or None}).items() if value is not None]
    if idle:
        got = f"--estimate {name} with {', '.join(idle)}"
        raise InputError(got, "estimates, which know of no measurement, provider or threads", "leave one of them out")
    return Estimated(estimate_named(name))


def _timed(table: LatencyTable, where: Circumstances) -> tuple[Circumstances, list[Timed], int]:
    """What was timed there at the level most was timed at, and how many latencies do not say what they are of."""
    levels = [found for found in table.circumstances() if found.at("all") == where.at("all")]
    best = max(levels, key=lambda found: len(table.records(found)))
    records = [record for record in table.records(best) if record.kind == CHAIN and record.ms is not None]
    works = [(read_work(record.what), record.ms) for record in records]
    timed = [Timed(work, ms) for work, ms in works if work is not None and ms is not None]
    return best, timed, len(records) - len(timed)


def _show(made: Roofline, errors: Errors, timed: Sequence[Timed]) -> None:
    seen: set[OpClass] = {step.op_class for each in timed for step in each.work.steps}
    rates = ", ".join(f"{name} {made.efficiency[name]:.2f}" for name in OP_CLASSES if name in seen)
    peaks = ", ".join(f"{rate / 1e9:.3g} GFLOP/s in {name}" for name, rate in made.peak_flops.items())
    kinds = {kind_of(name) for name in seen}
    overlap = ", ".join(f"{kind} {made.overlap[kind]:.2f}" for kind in KINDS if kind in kinds)
    rows = {
        "peak": peaks,
        "efficiency": rates,
        "half length": f"{made.half_length:.3g} multiply-accumulates per output",
        "bandwidth": f"{made.bandwidth / 1e9:.3g} GB/s",
        "overlap": f"{overlap} (1: transfers hide behind arithmetic, 0: one follows the other)",
        "launch": f"{made.launch_s * 1e6:.2g} us per operator",
        "fitted to": str(errors),
    }
    if errors.ratio_median is not None:
        rows["chain / layer"] = f"half within {errors.ratio_median:.0%} and nine tenths within {errors.ratio_p90:.0%}"
    _say(made.device)
    grid = Table(box=None, show_header=False, pad_edge=False)
    for name, text in rows.items():
        grid.add_row(f"  {name}", escape(text))
    _out.print(grid)


def _say(text: str) -> None:
    _out.print(text, markup=False, highlight=False, soft_wrap=True)
