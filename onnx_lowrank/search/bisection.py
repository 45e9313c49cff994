"""Which rewrite is to blame: the first one after which outputs differ by more than the tolerance."""

from __future__ import annotations

from dataclasses import dataclass, replace

from onnx_lowrank.goals import DEFAULT_GOAL, MaxError
from onnx_lowrank.pass_manager import bisect
from onnx_lowrank.search.analysis import Analysis
from onnx_lowrank.settings import Settings
from onnx_lowrank.validation import compare


@dataclass(frozen=True)
class Blame:
    """The result: the node whose rewrite first takes the error beyond `tolerance`; None if none does."""

    tolerance: float
    node: str | None
    rewrite: str
    error_before: float
    error_after: float


def first_difference(analysis: Analysis, settings: Settings) -> Blame:
    """Realise prefixes of the best plan, in graph order, until the first rewrite beyond the tolerance is found.

    The tolerance is that of --max-error, else 0.01.
    """
    tolerance = settings.goal.value if isinstance(settings.goal, MaxError) else DEFAULT_GOAL.value
    plan = analysis.outcome.best.plan
    rewrites = [choice for choice in plan.layers if not choice.keeps]
    errors: dict[int, float] = {}

    def error(count: int) -> float:
        if count not in errors:
            path, _ = analysis.bench.finish(replace(plan, layers=tuple(rewrites[:count])))
            source, metric = analysis.source, settings.error_metric
            data, seed = source.held_out, settings.seed
            found = compare(source.path, path, settings.target, data, seed=seed, error_metric=metric)
            errors[count] = found.error(metric)
        return errors[count]

    found = bisect(len(rewrites), lambda count: error(count) > tolerance)
    if found is None:
        return Blame(tolerance, None, "no rewrite", 0.0, error(len(rewrites)))
    if found == 0:
        return Blame(tolerance, None, "the graph passes, before any factorization", 0.0, error(0))
    choice = rewrites[found - 1]
    rank = "x".join(map(str, choice.rank))
    return Blame(tolerance, choice.node, f"{choice.method} at rank {rank}", error(found - 1), error(found))
