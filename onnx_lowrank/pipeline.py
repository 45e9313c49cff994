"""The whole road as a table of contents: optimize, plan, apply."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from onnx_lowrank.calibration.affordable import usable
from onnx_lowrank.catalogue import all_decompositions, split
from onnx_lowrank.chain import Fit
from onnx_lowrank.decomposition import Decomposition
from onnx_lowrank.errors import InputError, InvalidResultError, LowRankError, NonFiniteResultError, ProviderError
from onnx_lowrank.goals import KeepMacs, KeepParams, LatencyMs, MaxError, Speedup
from onnx_lowrank.graph import io
from onnx_lowrank.graph.layers import layers
from onnx_lowrank.metrics import Scores
from onnx_lowrank.output import check_paths, publish, staging
from onnx_lowrank.pass_manager import PassManager
from onnx_lowrank.passes.factor import Factor
from onnx_lowrank.plan import DATA_FREE, REFIT, Plan
from onnx_lowrank.progress import Phases
from onnx_lowrank.providers import require_provider
from onnx_lowrank.refit import arrays, chosen_layers, refit
from onnx_lowrank.report.assemble import assemble, original_scores
from onnx_lowrank.report.model import Report
from onnx_lowrank.search.analysis import Analysis, analyse
from onnx_lowrank.search.attempt import Outcome
from onnx_lowrank.search.device import Device
from onnx_lowrank.search.prepare import tuned_for
from onnx_lowrank.search.source import Source, read_source, source_of
from onnx_lowrank.settings import Settings
from onnx_lowrank.target import Target
from onnx_lowrank.validation import compare

logger = logging.getLogger(__name__)


def optimize(
    model: Path | str,
    out: Path | str,
    settings: Settings | None = None,
    phases: Phases | None = None,
    *,
    beside: Collection[Path] = (),
) -> tuple[Report, Plan]:
    """Write the best model for the goal to `out`, and report what was done.

    Args:
        model: The model to optimize; never changed.
        out: Receives the result; appears whole or not at all.
        settings: Goal, target, data and everything else.
        phases: Timed, and shown by its owner.
        beside: Other files the caller will write; checked before the search as `out` is.

    Returns:
        The report, and the plan that `apply` needs to write the same file again. Whether the goal was reached is in
        `report.goal.reached`; the best model found is written either way.

    Raises:
        InputError: for input that cannot be used; nothing is written.
        InvalidResultError: if the result misses a stated error limit or is not valid; nothing is written.
    """
    model, out = Path(model), Path(out)
    settings, phases = settings or Settings(), phases or Phases()
    for path in (out, *beside):
        check_paths(path, model, settings.calibration, settings.eval)
    require_provider(settings.target)
    with phases.phase("read"):
        source = source_of(model, settings)
        for path in (out, *beside):
            io.spare_sources(source.graph, path)
    settings = tuned_for(source, settings, phases)
    with phases.phase("evaluate"):
        scores = original_scores(source, settings)
    with staging(out) as folder:
        analysis = analyse(source, settings, folder, phases)
        try:
            report = assemble(analysis, settings, folder / out.name, phases, scores)
        except NonFiniteResultError as error:
            reached = isinstance(settings.goal, MaxError)
            analysis = analysis.keeping_all(
                f"factorized, {error.got}: the original is written as it is", reached=reached
            )
            report = assemble(analysis, settings, folder / out.name, phases, scores)
        path = folder / out.name
        if further := _further(analysis, report, settings, folder / "nearer" / out.name, phases, scores):
            analysis, report, path = *further, folder / "nearer" / out.name
        publish(path, out)
    return report, analysis.outcome.best.plan


def _further(
    analysis: Analysis, report: Report, settings: Settings, path: Path, phases: Phases, scores: Scores | None
) -> tuple[Analysis, Report] | None:
    """A second model, written to `path`, for a goal of speed that the finished one misses; None where it is no faster.

    Whatever goes wrong with it, there is the first.
    """
    goal, timed = settings.goal, report.latency
    if not isinstance(goal, Speedup | LatencyMs) or timed is None or report.goal.reached:
        return None
    path.parent.mkdir()
    try:
        nearer = analysis.nearer(goal, timed.speedup, timed.low_rank_speedup, timed.standing(goal))
        again = None if nearer is None else assemble(nearer, settings, path, phases, scores)
    except LowRankError as error:
        logger.warning("the goal is missed, and there is no faster model: %s", error)
        return None
    if nearer is None or again is None or again.latency is None or again.latency.standing(goal) <= timed.standing(goal):
        return None
    return nearer, again


def plan(
    model: Path | str,
    settings: Settings | None = None,
    phases: Phases | None = None,
    *,
    beside: Collection[Path] = (),
    there: Device | None = None,
) -> Outcome:
    """What `optimize` would realise; no model is written. The plan is `outcome.best.plan`.

    With `there`, for that device, by what is known of it; what is run here, for errors, runs on the CPU.

    Raises:
        InputError: for input that cannot be used.
    """
    settings, phases = settings or Settings(), phases or Phases()
    if there is None:
        require_provider(settings.target)
    else:
        if isinstance(settings.goal, KeepMacs | KeepParams):
            got, do = f"--{settings.goal} for {there.source}", "leave --table, --device and --estimate out"
            raise InputError(got, "a goal that time decides", f"no latency decides a goal of size: {do}")
        settings = replace(settings, target=there.planning(settings.target.shapes))
    with phases.phase("read"):
        source = source_of(Path(model), settings)
        for path in beside:
            io.spare_sources(source.graph, path)
    settings = tuned_for(source, settings, phases)
    with tempfile.TemporaryDirectory(prefix="onnx-lowrank-") as folder:
        return analyse(source, settings, Path(folder), phases, there).outcome


def apply(
    model: Path | str,
    a_plan: Plan,
    out: Path | str,
    *,
    calibration: Path | str | None = None,
    labelled: Path | str | None = None,
    preprocess: str | None = None,
    samples: int = Settings.samples,
    force: bool = False,
) -> None:
    """Realise a plan: the same model and plan give the same bytes.

    Args:
        model: The model the plan was made for.
        a_plan: The plan.
        out: Receives the result.
        calibration: The samples the plan was made with, or None.
        labelled: The labelled samples it was made with, where some of `calibration` are among them.
        preprocess: How images become arrays, as when the plan was made.
        samples: How many of the samples are used at most, as when the plan was made.
        force: Realise the plan although it was made for another model or other data.

    Raises:
        InputError: if the plan was made for another model or other data, or does not fit the model.
        PassError: if a pass fails.
        InvalidResultError: if the result does not run where the original does, or gives NaN where it does not.
    """
    model, out = Path(model), Path(out)
    check_paths(out, model, calibration, labelled)
    room = a_plan.memory_limit
    source = read_source(model, calibration, labelled, preprocess=preprocess, limit=samples, memory_limit=room)
    io.spare_sources(source.graph, out)
    _check_conditions(source, a_plan, force=force)
    passes, methods = split(a_plan.passes)
    allowed = all_decompositions() | {method.name: method for method in methods}
    with staging(out) as folder:
        if a_plan.changes_nothing:
            io.copy(model, folder / out.name)
        else:
            PassManager(passes).run(source.graph)
            Factor(a_plan, allowed).checked(source.graph)
            fits = _fits(source, a_plan, allowed, folder)
            PassManager([Factor(a_plan, allowed, fits=fits)]).run(source.graph)
            io.save(source.graph, folder / out.name)
        _try_out(source, folder / out.name)
        publish(folder / out.name, out)


def _fits(source: Source, a_plan: Plan, methods: Mapping[str, Decomposition], folder: Path) -> dict[str, Fit]:
    """The arrays of a plan that was made with samples.

    Raises:
        InputError: if the samples are missing or too few.
    """
    if a_plan.fit == DATA_FREE or all(choice.keeps for choice in a_plan.layers):
        return {}
    if source.samples is None:
        raise InputError(f"a plan of kind {a_plan.fit} without its samples", "--calibration", "give the same samples")
    chosen = chosen_layers(layers(source.graph, check=False)[0], a_plan, methods)
    target, regress = Target(), a_plan.fit == REFIT
    samples = usable(source.samples, source.path, source.graph, target, folder)
    with Phases().phase("refit") as advance:
        return arrays(refit(source.graph, chosen, samples, target, folder, advance, regress=regress))


def _try_out(source: Source, finished: Path) -> None:
    """Run a finished model once beside the original, on its samples or on inputs drawn to fit the signature.

    A plan says nothing about shapes, so where the original does not run on such inputs nothing can be said.

    Raises:
        InvalidResultError: if the result does not run where the original does, or gives NaN where it does not.
    """
    target = Target()
    try:
        found = compare(source.path, finished, target, source.data, most=1)
    except (InputError, ProviderError) as error:
        with contextlib.suppress(InputError, ProviderError):
            compare(source.path, source.path, target, source.data, most=1)
            got = f"{finished.name} that does not run where the original does ({error.got})"
            raise InvalidResultError(got, "a model that runs", "report this as a bug") from error
        logger.warning("the result was not run: the original gives no outputs either (%s)", error.got)
        return
    found.require_valid()


def _check_conditions(source: Source, a_plan: Plan, *, force: bool) -> None:
    if force:
        return
    found: Mapping[str, tuple[str | None, str | None]] = {
        "model": (source.sha256, a_plan.model_sha256),
        "data": (source.data.sha256 if source.data else None, a_plan.data_sha256),
    }
    for what, (got, wanted) in found.items():
        if got != wanted:
            raise InputError(
                f"{what} {(got or 'none')[:12]} for a plan made with {what} {(wanted or 'none')[:12]}",
                f"the {what} the plan was made with",
                "make the plan again, or use --force",
            )
