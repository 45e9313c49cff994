"""Model files run against each other in turns, over several inputs, in a bounded amount of memory.

They run in the measuring process: a model that crashes or hangs it is a `MeasuringError`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from onnx_lowrank.errors import LowRankError
from onnx_lowrank.graph.size import LARGE_BYTES, file_bytes
from onnx_lowrank.latency.child import shared
from onnx_lowrank.latency.measure import Clock, Paired, Until, joined, steady_clock
from onnx_lowrank.latency.messages import Contest, Finished, Subject, Weighted
from onnx_lowrank.signature import Feeds
from onnx_lowrank.target import Target

logger = logging.getLogger(__name__)
ROUNDS, LARGE_ROUNDS = 9, 5
# A model is timed as it is used: called again and again. Where small ones took turns run by run, each found its caches
# taken by the others, and the same two files compared 10 % differently from process to process (3 % now).
SAMPLE_S = 0.02
# Where the memory of a session happens to lie makes a small model up to 5 % faster or slower for as long as its process
# lives. What has to be true elsewhere is timed by several processes, one after the other.
SITTINGS, SITTING_ROUNDS = 3, 5


def common_clock(paths: Iterable[Path], targets: Iterable[Target]) -> Clock:
    """One clock for all these files on all these targets: the wall's, unless another one is steadier for each."""
    clocks = {steady_clock(target) for target in targets}
    return clocks.pop() if len(clocks) == 1 and not _large(paths) else Clock.WALL


def race(
    entries: Sequence[tuple[Path, str]],
    target: Target,
    samples: Sequence[Weighted],
    budget_s: float,
    enough: int = 0,
    clock: Clock | None = None,
) -> Paired:
    """Time model files in turns.

    Args:
        entries: File and optimization level of each; the first is the one the others are compared with.
        target: Where to run.
        samples: Inputs, and how much each counts.
        budget_s: Wall clock, opening excluded.
        enough: Runs of each to go on to although the ratios are known, as far as the budget goes.
        clock: To compare with other races on; None: the steadiest one for these.

    Raises:
        InputError, ProviderError: if a model does not open or run.
        MeasuringError: if the measuring process dies of a model.
    """
    return _race(_contest([(path, level, target) for path, level in entries], samples, budget_s, enough, clock))


def race_repeatedly(
    entries: Sequence[tuple[Path, str]], target: Target, samples: Sequence[Weighted], budget_s: float
) -> Paired:
    """`race` in several processes, within the same budget; one of them for files too large to be open together."""
    once, sittings = _divided(_contest([(path, level, target) for path, level in entries], samples, budget_s))
    parts: list[Paired] = []
    for _ in range(sittings):
        if sittings > 1:
            shared().close()
        parts.append(_race(once))
    return joined(parts)


def race_those_that_run(
    entries: Sequence[tuple[Path, str]],
    target: Target,
    samples: Sequence[Weighted],
    budget_s: float,
    enough: int = 0,
    clock: Clock | None = None,
) -> Finished:
    """`race_repeatedly` without the files that fail or that the measuring process dies of: those are refused, by index.

    If it dies of the first file, all are refused. Ratios are to the first file that ran.
    """
    contest = _contest([(path, level, target) for path, level in entries], samples, budget_s, enough, clock)
    once, sittings = _divided(contest)
    first = shared().contest(once)
    if first.paired is None:
        return first
    runs = [subject for index, subject in enumerate(once.subjects) if index not in first.refused]
    parts = [first.paired]
    for _ in range(sittings - 1):
        shared().close()
        again = shared().contest(replace(once, subjects=runs))
        if again.paired is None or again.refused:  # it ran once: what was measured then stands
            logger.warning("fewer processes than usual timed this: %s", next(iter(again.refused.values())))
            break
        parts.append(again.paired)
    return Finished(joined(parts), first.refused)


def refusal(path: Path, level: str, target: Target, feeds: Feeds) -> LowRankError | None:
    """Why a file does not run on `feeds`, tried in the measuring process; None where it does."""
    subject = Subject(path.absolute(), level, target, [(feeds, 1.0)])
    once = Contest([subject], Until(rounds=1, budget_s=0.0), Clock.WALL)
    return shared().contest(once).refused.get(0)


def race_targets(
    path: Path, level: str, targets: Sequence[Target], samples: Sequence[Weighted], budget_s: float
) -> Paired:
    """Time one model file on several targets of one machine in turns, as `race` does."""
    return _race(_contest([(path, level, target) for target in targets], samples, budget_s))


def _contest(
    entries: Sequence[tuple[Path, str, Target]],
    samples: Sequence[Weighted],
    budget_s: float,
    enough: int = 0,
    clock: Clock | None = None,
) -> Contest:
    paths = [path for path, _, _ in entries]
    clock = clock or common_clock(paths, [target for _, _, target in entries])
    # The measuring process stays in the folder it was started in.
    subjects = [Subject(path.absolute(), level, target, samples) for path, level, target in entries]
    if _large(paths):
        return Contest(subjects, Until(LARGE_ROUNDS, budget_s), clock, one_by_one=True)
    return Contest(subjects, Until(ROUNDS, budget_s, sample_s=SAMPLE_S, enough=enough), clock)


def _divided(contest: Contest) -> tuple[Contest, int]:
    """What one process does of a contest, and how many do so."""
    if contest.one_by_one:
        return contest, 1
    until = contest.until
    part = replace(until, rounds=SITTING_ROUNDS, budget_s=until.budget_s / SITTINGS, enough=until.enough // SITTINGS)
    return replace(contest, until=part), SITTINGS


def _race(contest: Contest) -> Paired:
    found = shared().ask(contest)
    for error in found.refused.values():
        raise error
    assert found.paired is not None  # noqa: S101 - nothing was refused
    return found.paired


def _large(paths: Iterable[Path]) -> bool:
    """Whether they are too large to be open together."""
    return sum(map(file_bytes, paths)) > LARGE_BYTES
