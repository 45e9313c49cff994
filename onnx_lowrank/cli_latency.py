"""The commands below `onnx-lowrank latency`: what was measured, as files, from and for other machines."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from onnx_lowrank import output
from onnx_lowrank.cli_options import (
    CalibrationOption,
    DeviceOption,
    JsonOption,
    KeepOption,
    ModelArgument,
    OnlyOption,
    OutOption,
    PassesOption,
    PreprocessOption,
    ProviderOption,
    ProviderOptionOption,
    SamplesOption,
    ShapeOption,
    ThreadsOption,
    given,
)
from onnx_lowrank.display import phases_on
from onnx_lowrank.errors import InputError
from onnx_lowrank.graph import io
from onnx_lowrank.latency.circumstances import Circumstances
from onnx_lowrank.latency.estimates import shipped
from onnx_lowrank.latency.table import LatencyTable
from onnx_lowrank.latency.table_file import Section, merge, read, sections, to_json
from onnx_lowrank.latency_request import REQUESTABLE, SCRIPT, write_request
from onnx_lowrank.recipe import Recipe
from onnx_lowrank.request import provider_options, settings_of
from onnx_lowrank.search.elsewhere import Choice, Elsewhere, elsewhere
from onnx_lowrank.search.source import source_of

app = typer.Typer(help="Latencies measured so far: show, export, import, and measure on another device.")
_out, _err = Console(), Console(stderr=True)
TableArgument = Annotated[Path | None, typer.Argument(metavar="[TABLE]", help="An exported table; by default yours.")]


@app.command()
def show(file: TableArgument = None, *, as_json: JsonOption = False) -> None:
    """List what was measured where: devices, providers, threads, versions, and how much of each."""
    found = _held() if file is None else read(file)
    if as_json:
        summaries = [
            {"circumstances": s.where.to_dict(), "chains": s.chains, "models": s.models, "dropped": s.dropped}
            | {"disturbed": s.disturbed}
            | {"channel_blocks": s.blocks, "measured": list(s.measured)}
            for s in found
        ]
        typer.echo(json.dumps(summaries, indent=1))
    else:
        for device in dict.fromkeys(section.where.device for section in found):
            _say(device)
            _out.print(_table([section for section in found if section.where.device == device]))
        if not found:
            _say("nothing was measured yet")


@app.command()
def export(
    out: OutOption,
    *,
    device: DeviceOption = None,
    provider: ProviderOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Write your latencies to a file, those of one device only if it is named."""
    output.check_paths(out)
    choice = Choice(device, provider, (), threads)
    found = _held(choice)
    if not found:
        got = f"a table without latencies of {choice}" if str(choice) else "a table without latencies"
        raise InputError(got, "at least one", "see what there is with `onnx-lowrank latency show`")
    io.write_text(out, to_json(found))
    count = sum(len(section.records) for section in found)
    devices = len({section.where.label for section in found})
    _say(f"{count} latencies of {devices} device(s) written to {out}")


@app.command("import")
def import_(file: Annotated[Path, typer.Argument(metavar="TABLE", help="An exported table.")]) -> None:
    """Add the latencies of a file to yours; those of other devices are never used for this one."""
    with LatencyTable() as table:
        for merged in merge(table, read(file)):
            here = " (not here)" if _is_foreign(merged.where) else ""
            level = f"level {merged.where.level}"
            _say(f"{merged.new} new, {merged.known} known: {merged.where.label}, {level}{here}")


@app.command()
def forget(
    *,
    device: DeviceOption = None,
    provider: ProviderOption = None,
    threads: ThreadsOption = None,
    disturbed: Annotated[bool, typer.Option("--disturbed", help="Only what was timed beside other work.")] = False,
) -> None:
    """Remove latencies of this machine from your table, or of --device: the next run that needs them measures anew."""
    choice = Choice(device, provider, (), threads)
    with LatencyTable() as table:
        chosen = [where for where in table.circumstances() if choice.fits(where) and (device or not _is_foreign(where))]
        gone = [table.forget(where, disturbed=disturbed) for where in chosen]
    _say(f"{sum(gone)} latencies forgotten")


@app.command()
def request(
    model: ModelArgument,
    out: OutOption,
    *,
    calibration: CalibrationOption = None,
    preprocess: PreprocessOption = None,
    samples: SamplesOption = None,
    provider: ProviderOption = None,
    provider_option: ProviderOptionOption = None,
    threads: ThreadsOption = None,
    shape: ShapeOption = None,
    passes: PassesOption = None,
    only: OnlyOption = None,
    keep: KeepOption = None,
) -> None:
    """Write what another device must time for MODEL, with a script that needs python, numpy and onnxruntime."""
    asked = given(locals(), None)
    settings = settings_of(asked, provider_option or ())
    if settings.target.provider not in REQUESTABLE:
        got, do = f"--provider {settings.target.provider}", "run `onnx-lowrank optimize` on the device itself"
        raise InputError(got, f"one of {', '.join(REQUESTABLE)}, which the script can time", do)
    output.check_paths(out, model, settings.calibration)
    phases = phases_on(_err)
    with phases.phase("read"):
        source = source_of(model, settings)
        io.spare_sources(source.graph, out)
    with output.staging(out) as folder:
        count = write_request(source, settings, folder / out.name, phases, threads=asked.threads or 0)
        output.publish(folder / out.name, out)
    _say(f"{count} chains and layers in {out}; on the device: unpack {SCRIPT} beside it and run `python {SCRIPT}`")


def chosen_device(
    file: Path | None, asked: Recipe, device: str | None, options: Sequence[str], model: Path
) -> Elsewhere | None:
    """The device a plan is for, or None for this one.

    Args:
        file: --table; None: the user's own table, if a device is named.
        asked: Everything else on the command line.
        device: --device.
        options: --provider-option.
        model: For the command that measures what is missing.

    Raises:
        InputError: if the table cannot be used, or holds none or several of what is asked for.
    """
    if file is None and device is None:
        return None
    choice = Choice(device, asked.provider, provider_options(options), asked.threads)
    remedy = f"measure it there: {_request_command(model, asked, options)}"
    if (device or "").lower() in shipped():
        remedy += f", or plan by estimates: --estimate {(device or '').lower()}"
    if file is None:
        return elsewhere(LatencyTable(), choice, "your latency table", remedy)
    table = LatencyTable.in_memory()
    merge(table, read(file))
    return elsewhere(table, choice, str(file), remedy)


def _request_command(model: Path, asked: Recipe, options: Sequence[str]) -> str:
    """The command that asks for what a plan with these options needs."""
    words = ["onnx-lowrank", "latency", "request", str(model), "-o", "request.zip"]
    for name in ("calibration", "preprocess", "samples", "provider", "threads"):
        value = getattr(asked, name)
        words += [] if value is None else [f"--{name}", str(value)]
    words += [] if asked.passes is None else ["--passes", ",".join(map(str, asked.passes))]
    repeated = {"provider-option": options, "shape": asked.shape, "only": asked.only, "keep": asked.keep}
    words += [word for name, values in repeated.items() for value in values or () for word in (f"--{name}", value)]
    return shlex.join(words)


def _held(choice: Choice | None = None) -> list[Section]:
    with LatencyTable() as table:
        found = sections(table, (choice or Choice()).fits)
    return [section for section in found if section.records]


def _is_foreign(where: Circumstances) -> bool:
    target = where.target()
    return Circumstances.here(target, where.level) != where


def _table(found: Sequence[Section]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("  provider", overflow="fold")
    for name in ("threads", "onnxruntime", "level", "chains", "disturbed", "models"):
        table.add_column(name, justify="left" if name in {"onnxruntime", "level"} else "right")
    for name in ("channel blocks", "measured"):
        table.add_column(name, overflow="fold")
    for section in found:
        where = section.where
        provider = " ".join([where.provider, *(f"{name}={value}" for name, value in where.options)])
        blocks = " ".join(f"{kind} {block}" for kind, block in section.blocks.items())
        first, last = section.measured
        counts = map(str, (section.chains, section.disturbed, section.models))
        span = first if first == last else f"{first} to {last}"
        row = (f"  {provider}", str(where.threads), where.onnxruntime, where.level, *counts, blocks, span)
        table.add_row(*map(escape, row))
    return table


def _say(text: str) -> None:
    _out.print(text, markup=False, highlight=False, soft_wrap=True)
