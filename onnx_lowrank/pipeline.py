"""The whole road as a table of contents: optimize, plan, apply."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Collection, Generator, Mapping
from pathlib import Path

from onnx_lowrank.catalogue import all_decompositions, split
from onnx_lowrank.errors import InputError
from onnx_lowrank.graph import io
from onnx_lowrank.pass_manager import PassManager
from onnx_lowrank.passes.factor import Factor
from onnx_lowrank.plan import Plan
from onnx_lowrank.progress import Phases
from onnx_lowrank.report.assemble import assemble
from onnx_lowrank.report.model import Report
from onnx_lowrank.search.analysis import Source, analyse, read_source, tuned_for
from onnx_lowrank.search.loop import Outcome
from onnx_lowrank.settings import Settings


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
    with phases.phase("read"):
        source = read_source(model, settings.calibration, settings.eval)
        for path in (out, *beside):
            io.spare_sources(source.graph, path)
    settings = tuned_for(source, settings, phases)
    with staging(out) as folder:
        analysis = analyse(source, settings, folder, phases)
        report = assemble(analysis, settings, folder / out.name, phases)
        publish(folder / out.name, out)
    return report, analysis.outcome.best.plan


def plan(
    model: Path | str,
    settings: Settings | None = None,
    phases: Phases | None = None,
    *,
    beside: Collection[Path] = (),
) -> Outcome:
    """What `optimize` would realise; no model is written. The plan is `outcome.best.plan`.

    Raises:
        InputError: for input that cannot be used.
    """
    settings, phases = settings or Settings(), phases or Phases()
    with phases.phase("read"):
        source = read_source(Path(model), settings.calibration, settings.eval)
        for path in beside:
            io.spare_sources(source.graph, path)
    settings = tuned_for(source, settings, phases)
    with tempfile.TemporaryDirectory(prefix="onnx-lowrank-") as folder:
        return analyse(source, settings, Path(folder), phases).outcome


def apply(
    model: Path | str, a_plan: Plan, out: Path | str, *, calibration: Path | None = None, force: bool = False
) -> None:
    """Realise a plan: the same model and plan give the same bytes.

    Args:
        model: The model the plan was made for.
        a_plan: The plan.
        out: Receives the result.
        calibration: The samples the plan was made with, or None.
        force: Realise the plan although it was made for another model or other data.

    Raises:
        InputError: if the plan was made for another model or other data, or does not fit the model.
        PassError: if a pass fails.
    """
    model, out = Path(model), Path(out)
    check_paths(out, model, calibration)
    source = read_source(model, calibration)
    io.spare_sources(source.graph, out)
    _check_conditions(source, a_plan, force=force)
    passes, methods = split(a_plan.passes)
    allowed = all_decompositions() | {method.name: method for method in methods}
    PassManager([*passes, Factor(a_plan, allowed)]).run(source.graph)
    with staging(out) as folder:
        io.save(source.graph, folder / out.name)
        publish(folder / out.name, out)


def check_paths(out: Path, *inputs: Path | None) -> None:
    """Refuse an output that would destroy an input or cannot be written.

    Raises:
        InputError: with what is wrong.
    """
    parent = out.absolute().parent
    for read in inputs:
        if read is not None and (out.resolve() == read.resolve() or (out.exists() and _same(out, read))):
            raise InputError(f"{out} to write to, the same file as {read}", "a file of its own", "choose another one")
    if out.is_dir():
        raise InputError(f"the folder {out} as output", "a file name", f"write to {out / 'model.onnx'}")
    if not parent.is_dir():
        raise InputError(f"output in {parent}, which is no folder", "an existing folder", "make it first")
    if not os.access(parent, os.W_OK):
        raise InputError(f"output in {parent}, which is not writable", "a writable folder", "choose another one")


def _same(out: Path, read: Path) -> bool:
    return read.exists() and read.samefile(out)


@contextlib.contextmanager
def staging(out: Path) -> Generator[Path]:
    """A folder beside `out` for everything that is not finished yet; it is gone afterwards, whatever happens.

    Raises:
        InputError: if it cannot be made.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.absolute().parent))
    except OSError as error:
        raise InputError(
            f"{out.absolute().parent} ({error.strerror})", "a writable folder", "choose another"
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(finished: Path, out: Path) -> None:
    """Move a finished file, its external data first, to where the user wants it."""
    data = finished.with_name(finished.name + ".data")
    if data.exists():
        data.replace(out.with_name(data.name))
    finished.replace(out)


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
