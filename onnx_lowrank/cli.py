"""The command line: options in, exit code out. Everything else happens in the rooms below.

Exit codes: 0 done; 2 bad usage or bad input; 3 goal not reached (the best found is written), or nothing rewritten with
--fail-if-unchanged; 4 the result is invalid and nothing is written; 130 interrupted.
"""

from __future__ import annotations

import json
import logging
import shlex
import signal
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from onnx_lowrank import cli_compare, cli_latency, cli_roofline, inspection, output, pipeline
from onnx_lowrank.catalogue import catalogue
from onnx_lowrank.cli_options import (
    AllocatorOption,
    BatchesOption,
    BisectOption,
    CalibrationOption,
    DeviceOption,
    ErrorMetricOption,
    EstimateOption,
    EvalOption,
    EvaluationsOption,
    FallbackOption,
    JsonOption,
    KeepMacsOption,
    KeepOption,
    KeepParamsOption,
    LatencyOption,
    LevelsOption,
    MaxDropOption,
    MaxErrorOption,
    MemoryOption,
    MetricOption,
    ModelArgument,
    NoRefitOption,
    OfOption,
    OnlyOption,
    OutOption,
    PassesOption,
    PreprocessOption,
    ProviderOption,
    ProviderOptionOption,
    RecipeOption,
    SamplesOption,
    SeedOption,
    ShapeOption,
    SpeedupOption,
    TableOption,
    ThreadsListOption,
    ThreadsOption,
    TimeOption,
    given,
)
from onnx_lowrank.data import read_samples
from onnx_lowrank.demo import run_demo
from onnx_lowrank.display import catalogue_table, phases_on, plan_table
from onnx_lowrank.divergence import first_divergence
from onnx_lowrank.doctor import diagnose
from onnx_lowrank.doctor import render as render_findings
from onnx_lowrank.errors import GoalNotReachedError, InputError, LowRankError, PassError
from onnx_lowrank.graph import io
from onnx_lowrank.plan import Plan
from onnx_lowrank.profile import profile as profile_models
from onnx_lowrank.profile import render as render_profile
from onnx_lowrank.profile.sweep import parse_sweep
from onnx_lowrank.report.model import folder_for
from onnx_lowrank.report.terminal import show
from onnx_lowrank.request import settings_of
from onnx_lowrank.search.device import Device
from onnx_lowrank.signature import signature_of
from onnx_lowrank.validation import compare, render

app = typer.Typer(
    name="onnx-lowrank",
    help="ONNX model in, faster ONNX model out, with proof.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(cli_latency.app, name="latency")
app.command()(cli_compare.compare)
INTERRUPTED = 130
GOAL_MISSED = GoalNotReachedError.exit_code
# Usage errors of typer's parser; the class has moved between its versions, its subclass has not.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[2]
_out, _err = Console(), Console(stderr=True)


@app.callback()
def options(
    *,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens, on standard error.")] = False,
) -> None:
    """Set up logging."""
    level = logging.INFO if verbose else logging.WARNING
    handler = RichHandler(console=_err, show_time=False, show_path=False)
    logging.basicConfig(level=level, format="%(message)s", handlers=[handler], force=True)


@app.command()
def optimize(
    model: ModelArgument,
    out: OutOption,
    *,
    speedup: SpeedupOption = None,
    latency_ms: LatencyOption = None,
    max_error: MaxErrorOption = None,
    max_drop: MaxDropOption = None,
    keep_macs: KeepMacsOption = None,
    keep_params: KeepParamsOption = None,
    calibration: CalibrationOption = None,
    preprocess: PreprocessOption = None,
    samples: SamplesOption = None,
    no_refit: NoRefitOption = False,
    labelled: EvalOption = None,
    metric: MetricOption = None,
    error_metric: ErrorMetricOption = None,
    provider: ProviderOption = None,
    provider_option: ProviderOptionOption = None,
    threads: ThreadsOption = None,
    shape: ShapeOption = None,
    passes: PassesOption = None,
    allocator: AllocatorOption = None,
    evaluations: EvaluationsOption = None,
    recipe: RecipeOption = None,
    of: OfOption = None,
    only: OnlyOption = None,
    keep: KeepOption = None,
    seed: SeedOption = None,
    time_limit: TimeOption = None,
    memory_limit: MemoryOption = None,
    allow_fallback: FallbackOption = False,
    fail_if_unchanged: Annotated[bool, typer.Option(help="Exit with 3 when no layer was rewritten.")] = False,
    bisect: BisectOption = False,
    plan_out: Annotated[Path | None, typer.Option(help="Write the plan that `apply` realises.")] = None,
    report: Annotated[Path | None, typer.Option(help="Folder that receives report.json.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Make MODEL faster: factor its layers where that was measured to pay."""
    asked = given(locals(), recipe)
    settings = settings_of(asked, provider_option or ())
    output.check_paths(out, model, recipe)
    if plan_out is not None:
        output.check_paths(plan_out, model, out, settings.calibration, settings.eval, recipe)
    if report is not None and report.exists() and not report.is_dir():
        raise InputError(f"--report {report}, which is no folder", "a folder", "give another path")
    beside = [path for path in (plan_out, report / "report.json" if report else None) if path is not None]
    with folder_for(report):
        result, plan = pipeline.optimize(model, out, settings, phases_on(_err), beside=beside)
    if report is not None:
        result.write(report)
    if plan_out is not None:
        io.write_text(plan_out, plan.to_json())
    if as_json:
        typer.echo(result.to_json(), nl=False)
    else:
        show(result, _out)
        _out.print(f"written to {out}" + (f", report in {report}" if report else ""), markup=False, highlight=False)
    if not result.goal.reached:
        raise GoalNotReachedError(
            result.goal.reason, f"{result.goal.kind} {result.goal.value:g}", f"the best found is in {out}"
        )
    if asked.fail_if_unchanged and not result.factorized:
        raise GoalNotReachedError(
            "no layer rewritten", "at least one with --fail-if-unchanged", "see the reasons per layer"
        )


@app.command()
def plan(
    model: ModelArgument,
    out: OutOption,
    *,
    speedup: SpeedupOption = None,
    latency_ms: LatencyOption = None,
    max_error: MaxErrorOption = None,
    max_drop: MaxDropOption = None,
    keep_macs: KeepMacsOption = None,
    keep_params: KeepParamsOption = None,
    calibration: CalibrationOption = None,
    preprocess: PreprocessOption = None,
    samples: SamplesOption = None,
    no_refit: NoRefitOption = False,
    labelled: EvalOption = None,
    metric: MetricOption = None,
    error_metric: ErrorMetricOption = None,
    provider: ProviderOption = None,
    provider_option: ProviderOptionOption = None,
    threads: ThreadsOption = None,
    table: TableOption = None,
    device: DeviceOption = None,
    estimate: EstimateOption = None,
    shape: ShapeOption = None,
    passes: PassesOption = None,
    allocator: AllocatorOption = None,
    evaluations: EvaluationsOption = None,
    recipe: RecipeOption = None,
    of: OfOption = None,
    only: OnlyOption = None,
    keep: KeepOption = None,
    seed: SeedOption = None,
    time_limit: TimeOption = None,
    memory_limit: MemoryOption = None,
    allow_fallback: FallbackOption = False,
) -> None:
    """Do the same analysis, write the plan and no model."""
    asked = given(locals(), recipe)
    settings = settings_of(asked, provider_option or ())
    output.check_paths(out, model, settings.calibration, settings.eval, recipe, table, estimate)
    there: Device | None = cli_roofline.estimated_device(estimate, table, device, asked, provider_option or ())
    there = there or cli_latency.chosen_device(table, asked, device, provider_option or (), model)
    outcome = pipeline.plan(model, settings, phases_on(_err), beside=(out,), there=there)
    made = outcome.best.plan
    io.write_text(out, made.to_json())
    count = sum(not choice.keeps for choice in made.layers)
    _out.print(
        f"{count} of {len(made.layers)} layers to be factorized; written to {out}", markup=False, highlight=False
    )
    if there is not None:
        _out.print(plan_table(made))
        _out.print(outcome.reason, markup=False, highlight=False, soft_wrap=True)
    if not outcome.reached:
        raise GoalNotReachedError(outcome.reason, str(settings.goal), f"the best plan found is in {out}")


@app.command()
def apply(
    model: ModelArgument,
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file.")],
    out: OutOption,
    *,
    calibration: CalibrationOption = None,
    labelled: EvalOption = None,
    preprocess: PreprocessOption = None,
    samples: SamplesOption = None,
    force: Annotated[bool, typer.Option(help="Realise it although it was made for another model or data.")] = False,
) -> None:
    """Realise a plan: the same model and plan give the same bytes."""
    made = Plan.read(plan_file)
    settings = settings_of(given(locals(), None))
    output.check_paths(out, plan_file)
    pipeline.apply(
        model,
        made,
        out,
        calibration=calibration,
        labelled=labelled,
        preprocess=preprocess,
        samples=settings.samples,
        force=force,
    )
    count = sum(not choice.keeps for choice in made.layers)
    _out.print(f"{count} layers factorized; written to {out}", markup=False, highlight=False)


@app.command()
def validate(
    original: ModelArgument,
    optimized: Annotated[Path, typer.Argument(metavar="OPTIMIZED", help="The model to compare with it.")],
    *,
    data: Annotated[
        str | None, typer.Option(help="Samples, as `optimize` takes them; without, inputs are drawn to fit.")
    ] = None,
    preprocess: PreprocessOption = None,
    max_error: MaxErrorOption = None,
    error_metric: ErrorMetricOption = None,
    provider: ProviderOption = None,
    provider_option: ProviderOptionOption = None,
    threads: ThreadsOption = None,
    shape: ShapeOption = None,
    seed: SeedOption = None,
    allow_fallback: FallbackOption = False,
    bisect: Annotated[bool, typer.Option(help="Name the first tensor, in graph order, that differs too much.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare the outputs of two models."""
    settings = settings_of(given(locals(), None), provider_option or ())
    signature = signature_of(io.load(original).to_proto())
    dataset = None if data is None else read_samples(data, signature.inputs, preprocess=preprocess)
    found = compare(
        original,
        optimized,
        settings.target,
        dataset,
        max_error,
        seed=settings.seed,
        error_metric=settings.error_metric,
    )
    if dataset is not None:
        found = replace(found, data="given")  # nobody knows here what the model was fitted on
    parted = None
    if bisect:
        tolerance = settings.goal.value
        parted = first_divergence(original, optimized, settings.target, dataset, tolerance, seed=settings.seed)
    if as_json:
        typer.echo(json.dumps(found.to_dict() | ({"bisect": parted.to_dict()} if parted else {}), indent=1))
    else:
        _out.print(render(found))
        if parted:
            _out.print(str(parted), markup=False, highlight=False, soft_wrap=True)
    found.require_valid()


@app.command()
def profile(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL...", help="Models; the first is compared with.")],
    *,
    provider: ProviderOption = None,
    provider_option: ProviderOptionOption = None,
    threads_list: ThreadsListOption = None,
    batches: BatchesOption = None,
    levels: LevelsOption = None,
    shape: ShapeOption = None,
    allow_fallback: FallbackOption = False,
    seconds: Annotated[float, typer.Option(help="How long to time each combination, at most.", min=0.1)] = 20.0,
    out: Annotated[Path | None, typer.Option("--output", "-o", help="Receives the JSON, whole or not at all.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Time models in turns, for every combination of threads, batch and level, and say where the time goes."""
    settings = settings_of(given(locals(), None), provider_option or ())
    sweep = parse_sweep(threads_list, batches, levels)
    if out is not None:
        output.check_paths(out, *models)
    result = profile_models(models, settings.target, budget_s=seconds, sweep=sweep, phases=phases_on(_err))
    if out is not None:
        io.write_text(out, result.to_json())
    if as_json:
        typer.echo(result.to_json(), nl=False)
    else:
        render_profile(result, _out)
        if out is not None:
            _out.print(f"written to {out}", markup=False, highlight=False)


@app.command("inspect")
def inspect_(
    model: ModelArgument,
    *,
    calibration: CalibrationOption = None,
    preprocess: PreprocessOption = None,
    provider: ProviderOption = None,
    provider_option: ProviderOptionOption = None,
    threads: ThreadsOption = None,
    shape: ShapeOption = None,
    passes: PassesOption = None,
    only: OnlyOption = None,
    keep: KeepOption = None,
    allow_fallback: FallbackOption = False,
    spectrum: Annotated[
        bool, typer.Option("--spectrum", help="Show measures of rank; with --calibration of the outputs too.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List every weight-bearing layer: shape, share of the work, spectrum, verdict."""
    settings = settings_of(given(locals(), None), provider_option or ())
    rows = inspection.inspect(model, settings, phases_on(_err), whitened=spectrum)
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        _out.print(inspection.render_spectra(rows) if spectrum else inspection.render(rows))
        if spectrum and calibration is not None and (missing := inspection.unreached(rows)):
            _out.print(f"outputs of {', '.join(missing)} not shown: no samples can be led there", soft_wrap=True)


@app.command("passes")
def passes_(*, as_json: JsonOption = False) -> None:
    """List every pass and decomposition with its options."""
    if as_json:
        typer.echo(json.dumps([asdict(entry) for entry in catalogue()], indent=1))
    else:
        _out.print(catalogue_table())


@app.command()
def doctor(*, as_json: JsonOption = False) -> None:
    """Say what this installation and this machine can do."""
    findings = diagnose()
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        render_findings(findings, _out)


@app.command()
def demo(
    *,
    speedup: Annotated[float, typer.Option(help="Goal of the demo.")] = 1.5,
    threads: ThreadsOption = 1,
    out: Annotated[Path | None, typer.Option("--output", "-o", help="Keep the optimized model here.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Optimize the network that ships with the package, offline."""
    result = run_demo(speedup, threads or 0, out, phases_on(_err))
    if as_json:
        typer.echo(result.to_json(), nl=False)
    else:
        show(result, _out)
    if not result.goal.reached:
        raise GoalNotReachedError(result.goal.reason, f"{result.goal.kind} {result.goal.value:g}", "try a smaller goal")


def main() -> None:
    """Run the command line; never a traceback for bad input."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(run(sys.argv[1:]))


def _verbose_first(words: list[str]) -> list[str]:
    """-v behind a command, where it is looked for as often, means what it means in front of it."""
    end = words.index("--") if "--" in words else len(words)
    return sorted(words[:end], key=lambda word: word not in {"-v", "--verbose"}) + words[end:]


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code."""
    try:
        code = int(app(_verbose_first(arguments), standalone_mode=False) or 0)
    except LowRankError as error:
        if isinstance(error, PassError) and error.__cause__ is not None:
            logging.getLogger(__name__).info("what went wrong", exc_info=error.__cause__)
        _complain(str(error))
        return error.exit_code
    except _USAGE_ERROR as error:
        said = str(getattr(error, "format_message", error.__str__)()).rstrip(".")  # the parser's word for what is wrong
        got = (shlex.join(arguments) or "no arguments") + (f" ({said})" if said else "")
        _complain(str(InputError(got, "a command with its arguments", "see --help")))
        return 2
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:  # which is also what newer releases of typer make of Ctrl-C
        _complain("interrupted; what was not finished is gone")
    return code


def _terminate(number: int, _: object) -> None:
    # As an exception, so that what is not finished is cleared away.
    raise SystemExit(128 + number)


def _complain(message: str) -> None:
    # Not wrapped: scripts read it as one line.
    _err.print(f"[red]error:[/red] {escape(message)}", soft_wrap=True, highlight=False)
