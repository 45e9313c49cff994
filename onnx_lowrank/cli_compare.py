"""The command `compare`: every format beside the others, at matched budgets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from onnx_lowrank import comparison, output
from onnx_lowrank.cli_options import (
    CalibrationOption,
    EvalOption,
    FallbackOption,
    JsonOption,
    KeepOption,
    MemoryOption,
    MetricOption,
    ModelArgument,
    NoRefitOption,
    OfOption,
    OnlyOption,
    PassesOption,
    PreprocessOption,
    ProviderOption,
    ProviderOptionOption,
    SamplesOption,
    SeedOption,
    ShapeOption,
    ThreadsOption,
    TimeOption,
    given,
)
from onnx_lowrank.comparison.compare import DEFAULT_BUDGETS
from onnx_lowrank.display import phases_on
from onnx_lowrank.errors import InputError
from onnx_lowrank.goals import Goal, KeepMacs, KeepParams, Speedup
from onnx_lowrank.graph import io
from onnx_lowrank.report.model import folder_for
from onnx_lowrank.request import settings_of

BUDGETS = "Budgets (repeatable; none means --keep-macs 0.5 --speedup 2)"
_out, _err = Console(), Console(stderr=True)


def compare(
    model: ModelArgument,
    *,
    macs: Annotated[
        list[float] | None,
        typer.Option("--keep-macs", help="Share of the multiply-accumulates to keep.", rich_help_panel=BUDGETS),
    ] = None,
    params: Annotated[
        list[float] | None,
        typer.Option("--keep-params", help="Share of the parameters to keep.", rich_help_panel=BUDGETS),
    ] = None,
    speedups: Annotated[
        list[float] | None, typer.Option("--speedup", help="Times as fast as before.", rich_help_panel=BUDGETS)
    ] = None,
    calibration: CalibrationOption = None,
    preprocess: PreprocessOption = None,
    samples: SamplesOption = None,
    no_refit: NoRefitOption = False,
    labelled: EvalOption = None,
    metric: MetricOption = None,
    provider: ProviderOption = None,
    provider_option: ProviderOptionOption = None,
    threads: ThreadsOption = None,
    shape: ShapeOption = None,
    passes: PassesOption = None,
    of: OfOption = None,
    only: OnlyOption = None,
    keep: KeepOption = None,
    seed: SeedOption = None,
    time_limit: TimeOption = None,
    memory_limit: MemoryOption = None,
    allow_fallback: FallbackOption = False,
    models: Annotated[Path | None, typer.Option(help="Folder that keeps the network of every row.")] = None,
    out: Annotated[Path | None, typer.Option("--output", "-o", help="Receives the JSON, whole or not at all.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare all formats, or those of --passes, at the same budgets: layer by layer, and whole networks, measured."""
    settings = settings_of(given(locals(), None), provider_option or ())
    goals = budgets(macs or (), params or (), speedups or ())
    if models is not None and models.exists() and not models.is_dir():
        raise InputError(f"--models {models}, which is no folder", "a folder", "give another path")
    if out is not None:
        output.check_paths(out, model, settings.calibration, settings.eval)
    beside = () if out is None else (out,)
    with folder_for(models):
        found = comparison.compare(model, goals, settings, phases_on(_err), models=models, beside=beside)
    if out is not None:
        io.write_text(out, found.to_json())
    if as_json:
        typer.echo(found.to_json(), nl=False)
    else:
        comparison.render(found, _out)
        if out is not None:
            _out.print(f"written to {out}", markup=False, highlight=False)


def budgets(macs: Iterable[float], params: Iterable[float], speedups: Iterable[float]) -> Sequence[Goal]:
    """The budgets asked for, each once; the default ones where none are.

    Raises:
        InputError: for a value out of range.
    """
    asked = (*map(KeepMacs, macs), *map(KeepParams, params), *map(Speedup, speedups))
    return tuple(dict.fromkeys(asked)) or DEFAULT_BUDGETS
