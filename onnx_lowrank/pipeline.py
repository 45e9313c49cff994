"""The whole road as a table of contents: optimize, plan, apply."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Collection, Generator, Mapping
from dataclasses import replace
from pathlib import Path

from onnx_lowrank.calibration.affordable import usable
from onnx_lowrank.catalogue import all_decompositions, split
from onnx_lowrank.chain import Fit
from onnx_lowrank.decomposition import Decomposition
from onnx_lowrank.errors import InputError, InvalidResultError, NonFiniteResultError, ProviderError
from onnx_lowrank.goals import KeepMacs, KeepParams, MaxError
from onnx_lowrank.graph import io
from onnx_lowrank.graph.layers import layers
from onnx_lowrank.pass_manager import PassManager
from onnx_lowrank.passes.factor import Factor
from onnx_lowrank.plan import DATA_FREE, REFIT, Plan
from onnx_lowrank.progress import Phases
from onnx_lowrank.providers import require_provider
from onnx_lowrank.refit import arrays, chosen_layers, refit
from onnx_lowrank.report.assemble import assemble, original_scores
from onnx_lowrank.report.model import Report
from onnx_lowrank.search.analysis import analyse
from onnx_lowrank.search.attempt import Outcome
from onnx_lowrank.search.device import Device
from onnx_lowrank.search.prepare import tuned_for
from onnx_lowrank.search.source import Source, read_source
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
        source = _read(model, settings)
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
        publish(folder / out.name, out)
    return report, analysis.outcome.best.plan


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
        source = _read(Path(model), settings)
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
    source = read_source(model, calibration, labelled, preprocess=preprocess, limit=samples)
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
    target, regress = Target().exact(), a_plan.fit == REFIT
    samples = usable(source.samples, source.path, source.graph, target, folder)
    with Phases().phase("refit") as advance:
        return arrays(refit(source.graph, chosen, samples, target, folder, advance, regress=regress))


def check_paths(out: Path, *inputs: Path | str | None) -> None:
    """Refuse an output that would destroy an input or cannot be written.

    Raises:
        InputError: with what is wrong.
    """
    parent = out.absolute().parent
    for read in (Path(path) for path in inputs if path is not None):
        if read.is_dir() and out.exists() and out.resolve().is_relative_to(read.resolve()):
            raise InputError(f"{out} to write to, one of the samples in {read}", "a new file", "choose another one")
        if out.resolve() == read.resolve() or (out.exists() and read.exists() and read.samefile(out)):
            raise InputError(f"{out} to write to, the same file as {read}", "a file of its own", "choose another one")
    if out.is_dir():
        raise InputError(f"the folder {out} as output", "a file name", f"write to {out / 'model.onnx'}")
    if not parent.is_dir():
        raise InputError(f"output in {parent}, which is no folder", "an existing folder", "make it first")
    if not os.access(parent, os.W_OK):
        raise InputError(f"output in {parent}, which is not writable", "a writable folder", "choose another one")


def _read(model: Path, settings: Settings) -> Source:
    return read_source(
        model, settings.calibration, settings.eval, preprocess=settings.preprocess, limit=settings.samples
    )


@contextlib.contextmanager
def staging(out: Path) -> Generator[Path]:
    """A folder beside `out` for everything that is not finished yet; it is gone afterwards, whatever happens.

    Raises:
        InputError: if it cannot be made.
    """
    folder: Path | None = None
    try:
        with _undisturbed():  # a folder that nobody knows of yet would stay
            folder = _folder_beside(out)
        yield folder
    finally:
        with _undisturbed():
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)


def _folder_beside(out: Path) -> Path:
    parent = out.absolute().parent
    try:
        return Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=parent))
    except OSError as error:
        raise InputError(f"{parent} ({error.strerror})", "a writable folder", "choose another") from error


def publish(finished: Path, out: Path) -> None:
    """Move a finished file, its external data first, to where the user wants it: both or neither if interrupted."""
    data = finished.with_name(finished.name + ".data")
    with _undisturbed():
        if data.exists():
            data.replace(out.with_name(data.name))
        finished.replace(out)


@contextlib.contextmanager
def _undisturbed() -> Generator[None]:
    """SIGINT and SIGTERM that arrive in the block are heeded after it."""
    if threading.current_thread() is not threading.main_thread():  # signals only ever arrive there
        yield
        return
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in handlers:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set from Python
        for number in came[:1]:
            signal.raise_signal(number)


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
