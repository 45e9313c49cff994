"""Layer by layer: the best of every format within every budget, all of them timed in turns with the layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from onnx_lowrank.candidates import Candidate
from onnx_lowrank.comparison.model import Budget, Contender, LayerComparison, on_front
from onnx_lowrank.goals import Goal
from onnx_lowrank.latency.chains import ChainTimer, Share
from onnx_lowrank.latency.pieces import Job
from onnx_lowrank.progress import Phases
from onnx_lowrank.search.calibrated import CalibratedTable
from onnx_lowrank.search.matched import best_within, by_method, cost_of, share_of
from onnx_lowrank.search.table import Row

CLEARLY_LESS = 0.95
AS_IT_IS = (0.0, 1.0)  # error and time of the layer itself


def compared_layers(
    rows: Sequence[Row], goals: Sequence[Goal], timer: ChainTimer, table: CalibratedTable | None, phases: Phases
) -> tuple[LayerComparison, ...]:
    """Compare formats layer by layer.

    Args:
        rows: The table; candidates for budgets of speed have latencies.
        goals: The budgets.
        timer: Times what is shown anew: of many candidates the one that looks fastest was lucky, too.
        table: What was learnt from samples; None without.
        phases: Timed and shown.
    """
    found = [_best(row, goals) for row in rows]
    jobs = [Job(row.layer) for row in rows]
    jobs += [Job(row.layer, one.chain) for row, per in zip(rows, found, strict=True) for _, few in per for one in few]
    with phases.phase("time layers") as advance:
        shares = iter(timer.shares(jobs, advance))
    own = [next(shares) for _ in rows]
    compared: list[LayerComparison] = []
    for row, per, share in zip(rows, found, own, strict=True):
        contenders = [_contender(goal, row, name, [(one, next(shares)) for one in few]) for (goal, name), few in per]
        compared.append(
            _compared(row, contenders, share, calibrated=table is not None and row.layer.key in table.energies)
        )
    return tuple(compared)


Entry = tuple[tuple[Goal, str], Sequence[Candidate]]


def _best(row: Row, goals: Sequence[Goal]) -> list[Entry]:
    """(budget, format) -> the candidates to be timed again, the best first, for the formats that take the layer."""
    formats = {options[0].method: options for options in by_method(row.options[1:])}
    return [((goal, name), _few(mine, row.keep, goal)) for goal in goals for name, mine in formats.items()]


def _few(options: Sequence[Candidate], keep: Candidate, goal: Goal) -> list[Candidate]:
    """The best within a budget and, of time, the best that takes clearly less: the first may prove to be beyond it."""
    best = best_within(options, keep, goal)
    if best is None or cost_of(goal) != "ms":
        return [] if best is None else [best]
    less = [o for o in options if o.ms is not None and o.ms <= CLEARLY_LESS * best.cost("ms")]
    second = best_within(less, keep, goal)
    return [best] if second is None else [best, second]


def _contender(goal: Goal, row: Row, name: str, few: Sequence[tuple[Candidate, Share | None]]) -> Contender:
    """The best that is within the budget when timed again, else the last one, and said to be beyond it."""
    if not few:
        return Contender(str(Budget.of(goal)), name, reason=_out_of_reach(goal, row, name))
    most = share_of(goal) if cost_of(goal) == "ms" else math.inf
    known = [(o, s) for o, s in few if s is not None] or few
    best, share = next(((o, s) for o, s in known if s is not None and s.of_layer <= most), known[-1])
    found = Contender(str(Budget.of(goal)), name, best.rank, best.error, best.params, best.macs)
    if share is None:
        return found
    ms, beyond = share.layer_ms * share.of_layer, share.of_layer > most
    return replace(found, ms=ms, of_layer=share.of_layer, ci95=share.ci95, beyond=beyond)


def _out_of_reach(goal: Goal, row: Row, name: str) -> str:
    """How near the format comes to the budget."""
    cost = cost_of(goal)
    mine = [o for o in row.options[1:] if o.method == name and (cost != "ms" or o.ms is not None)]
    if not mine or (cost == "ms" and row.keep.ms is None):
        return "none of its chains could be timed"
    least = min(mine, key=lambda option: option.cost(cost))
    unit = {"ms": "time", "macs": "MACs", "params": "parameters"}[cost]
    rank = "x".join(map(str, least.rank))
    return f"not within it: {least.cost(cost) / row.keep.cost(cost):.2f} of the layer's {unit} at rank {rank}"


def _compared(row: Row, contenders: Sequence[Contender], share: Share | None, *, calibrated: bool) -> LayerComparison:
    layer = row.layer
    points = [None if c.error is None or c.of_layer is None else (c.error, c.of_layer) for c in contenders]
    fronts = on_front([AS_IT_IS, *points])[1:]
    return LayerComparison(
        name=layer.nodes[0],
        op=layer.form.op,
        shape=str(layer.shape),
        params=layer.shape.params,
        macs=layer.macs,
        ms=None if share is None else share.layer_ms,
        metric="outputs" if calibrated else "weight",
        contenders=tuple(replace(c, front=front) for c, front in zip(contenders, fronts, strict=True)),
        refusals=dict(row.refusals),
    )
