"""Budgets that formats are compared at, and the few ranks of each format near them.

A budget is a goal of size or speed. For one layer it is the same share of what the layer itself takes: 0.5 of its
multiply-accumulates, half of its latency. Errors fall with the rank, so the best a format can do within a budget stands
at one of its highest ranks there; a format that fits every rank by itself need not be asked for any other.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Self

from onnx_lowrank.candidates import Candidate, Cost, Grid, front, padded_macs, shares
from onnx_lowrank.decomposition import Decomposition, Rank
from onnx_lowrank.goals import Goal, KeepMacs, KeepParams, Speedup
from onnx_lowrank.layer import Array, Layer, LayerShape
from onnx_lowrank.search.table import Row

# Multiples of a budget and how many ranks below each are fitted: several where layers are compared, and one here and
# there for the allocation, which takes from one layer what it gives to another.
AROUND = ((0.1, 1), (0.25, 1), (0.5, 1), (0.7, 1), (1.0, 3), (1.4, 1))
_COSTS: dict[type[Goal], Cost] = {KeepMacs: "macs", KeepParams: "params", Speedup: "ms"}


def cost_of(goal: Goal) -> Cost:
    """What a budget limits."""
    return _COSTS[type(goal)]


def share_of(goal: Goal) -> float:
    """How much of it may remain."""
    return 1 / goal.value if isinstance(goal, Speedup) else goal.value


@dataclass(frozen=True)
class MatchedGrid(Grid):
    """Ranks near some budgets, every format by itself.

    `step` is that of ranks for speed.

    Args:
        fine: Ranks for size are multiples of it.
        goals: The budgets.
    """

    fine: int = 1
    goals: tuple[Goal, ...] = ()

    @classmethod
    def near(cls, goals: Sequence[Goal], shape: LayerShape, block: int) -> Self:
        """The grid of a layer on a machine with channel blocks of `block`."""
        return cls(block, block, block, fine=Grid.of_size(shape, block).step, goals=tuple(goals))

    def ranks(self, method: Decomposition, shape: LayerShape) -> Sequence[Rank]:
        """Those for size and those for speed, as far as there are such budgets."""
        return list(dict.fromkeys(rank for goal in self.goals for rank in self._ranks(method, shape, goal)))

    def fitted(self, layer: Layer, method: Decomposition, ranks: Sequence[Rank], weight: Array) -> Sequence[Rank]:
        """The highest ranks within each multiple of a budget in `AROUND`; the smallest one where none is within."""
        wanted: set[Rank] = set()
        for goal in self.goals:
            every = shares(layer, method, self._ranks(method, layer.shape, goal), cost_of(goal))
            sizes = {rank: every[rank] for rank in method.promising(weight, every)}
            for times, most in AROUND:
                if (limit := times * share_of(goal)) < 1:
                    wanted.update(highest(method, sizes, limit)[:most])
            if sizes and min(sizes.values()) >= share_of(goal):
                wanted.add(min(sizes, key=lambda rank: sizes[rank]))
        return [rank for rank in ranks if rank in wanted]

    def worth_timing(self, options: Sequence[Candidate]) -> list[Candidate]:
        """The fronts of each format by every kind of cost: no format is dropped because another is better."""
        kept: dict[Candidate, None] = {}
        for mine in by_method(options):
            for cost in ("macs", "params", "padded_macs"):
                kept |= dict.fromkeys(front(mine, attrgetter(cost)))
        return list(kept)

    def _ranks(self, method: Decomposition, shape: LayerShape, goal: Goal) -> Sequence[Rank]:
        fast = isinstance(goal, Speedup) or method.depthwise
        return method.ranks(shape, self.step if fast else self.fine)


def highest(method: Decomposition, sizes: dict[Rank, float], limit: float) -> list[Rank]:
    """Ranks within a limit that no other one within it exceeds in every entry, largest first.

    Args:
        method: Says which entries of a rank are an arrangement: ranks are compared where they agree in them.
        sizes: Size of every rank.
        limit: Of the size.
    """
    cut, within = method.structure, [rank for rank, size in sizes.items() if size <= limit]

    def below(rank: Rank, other: Rank) -> bool:
        same = rank[:cut] == other[:cut] and len(rank) == len(other)
        return rank != other and same and all(a <= b for a, b in zip(rank, other, strict=True))

    top = [rank for rank in within if not any(below(rank, other) for other in within)]
    return sorted(top, key=lambda rank: (-sizes[rank], rank))


def best_within(options: Iterable[Candidate], keep: Candidate, goal: Goal) -> Candidate | None:
    """The candidate with the least error that takes no more than its share of the layer; None if there is none."""
    cost = cost_of(goal)
    known = [option for option in options if cost != "ms" or option.ms is not None]
    within = [option for option in known if option.cost(cost) <= share_of(goal) * keep.cost(cost)]
    return min(within, key=lambda c: (c.error, c.cost(cost), c.method, c.rank), default=None)


def worth_pricing(row: Row, goals: Iterable[Goal]) -> set[Candidate]:
    """The candidates of every format that are nearest, by padded MACs, to the multiples of each budget of speed."""
    found: set[Candidate] = set()
    for goal in (goal for goal in goals if isinstance(goal, Speedup)):
        marks = [limit * row.keep.macs for times, _ in AROUND if (limit := times * share_of(goal)) < 1]
        for mine in by_method(row.options[1:]):
            best = front(mine)
            found |= {_nearest(best, mark) for mark in marks}
    return found


def worth_pricing_next(row: Row, goals: Iterable[Goal]) -> set[Candidate]:
    """Of every format the untimed candidate that comes nearest, going by those timed, to each budget of speed.

    Between the largest candidate within the budget and the next one beyond it time is taken to grow with the padded
    MACs; none is left where these two are neighbours.
    """
    found: set[Candidate] = set()
    for goal in (goal for goal in goals if isinstance(goal, Speedup) and row.keep.ms is not None):
        limit = share_of(goal) * row.keep.cost("ms")
        for mine in by_method(row.options[1:]):
            timed = [option for option in mine if option.ms is not None]
            inside = max((o for o in timed if o.cost("ms") <= limit), key=padded_macs, default=None)
            size, ms = (0.0, 0.0) if inside is None else (inside.padded_macs, inside.cost("ms"))
            larger = [o for o in timed if o.cost("ms") > limit and o.padded_macs > size]
            beyond = min(larger, key=padded_macs, default=row.keep)
            between = [o for o in front(mine) if o.ms is None and size < o.padded_macs < beyond.padded_macs]
            if between:
                slope = (beyond.padded_macs - size) / (beyond.cost("ms") - ms)
                found.add(_nearest(between, size + slope * (limit - ms)))
    return found


def of_formats(rows: Iterable[Row], formats: Collection[str], *, timed: bool) -> list[Row]:
    """The table with these formats alone; `timed`: with the candidates that have a latency alone."""
    return [
        replace(
            row,
            options=(
                row.keep,
                *(o for o in row.options[1:] if o.method in formats and not (timed and o.ms is None)),
            ),
            refusals={name: sentence for name, sentence in row.refusals.items() if name in formats},
        )
        for row in rows
    ]


def by_method(options: Iterable[Candidate]) -> list[list[Candidate]]:
    """The candidates of each format."""
    found: dict[str, list[Candidate]] = {}
    for option in options:
        found.setdefault(option.method, []).append(option)
    return list(found.values())


def _nearest(options: Sequence[Candidate], mark: float) -> Candidate:
    return min(options, key=lambda option: abs(math.log(option.padded_macs / mark)))
