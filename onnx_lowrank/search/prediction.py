"""Predicted latency of a choice, and the correction that measured models teach it.

    t(choice) = t_normalized + drift * sum over rewritten layers (kappa t_chain - t_layer)

with chains and layers timed alone. Chains timed alone look too fast where the whole model runs out of cache, so kappa,
1 at first, is solved for after every finished model and the allocation is done again with it. Chains may have been
timed when the machine was faster or slower than it is now: drift says by how much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from onnx_lowrank.candidates import Candidate, Cost, Problem
from onnx_lowrank.goals import Goal, KeepMacs
from onnx_lowrank.search.table import Row

KAPPA_RANGE = (0.5, 3.0)
# A goal of size is approached from a model this much larger: timed first, it corrects the prediction.
NEIGHBOUR = 1.15


@dataclass(frozen=True)
class Prediction:
    """What a choice is expected to take.

    Args:
        rows: The priced table.
        normalized_ms: Measured latency of the model before factorization.
        drift: Latency of layers now over that in the table.
        kappa: Correction of chain latencies.
    """

    rows: Sequence[Row]
    normalized_ms: float
    drift: float = 1.0
    kappa: float = 1.0

    def ms(self, chosen: Sequence[Candidate]) -> float:
        """Predicted latency of the model."""
        gain, chains = self._sums(chosen)
        return self.normalized_ms - self.drift * (gain - self.kappa * chains)

    def learned(self, chosen: Sequence[Candidate], measured_ms: float) -> Prediction:
        """With kappa such that the prediction of `chosen` would have been right."""
        gain, chains = self._sums(chosen)
        if chains <= 0:
            return self
        kappa = ((measured_ms - self.normalized_ms) / self.drift + gain) / chains
        return replace(self, kappa=min(max(kappa, KAPPA_RANGE[0]), KAPPA_RANGE[1]))

    def problem(self, wanted: float) -> Problem:
        """The allocation problem whose solutions are predicted to take `wanted` milliseconds or less.

        Only chains faster than their layer are options (or exact ones, which stand in the table as a check).
        """
        factorable = [row for row in self.rows if row.factorable]
        options = tuple(self._faster(row) for row in factorable)
        dense = sum(row.keep.cost("ms") for row in factorable)
        return Problem(options, "ms", (wanted - self.normalized_ms) / self.drift + dense)

    def fastest_ms(self) -> float:
        """Predicted latency when every layer takes its fastest option."""
        return self.ms(self.problem(0.0).cheapest())

    def _faster(self, row: Row) -> tuple[Candidate, ...]:
        dense = row.keep.cost("ms")
        chains = [option.timed(self.kappa * option.cost("ms")) for option in row.options[1:]]
        return (row.keep, *(option for option in chains if option.exact or option.cost("ms") < dense))

    def as_timed(self, chosen: Sequence[Candidate]) -> tuple[Candidate, ...]:
        """The choice with the latencies that were measured, without the correction."""
        raw = {o.name: o for row in self.rows for o in row.options}
        return tuple(raw[c.name] for c in chosen)

    def _sums(self, chosen: Sequence[Candidate]) -> tuple[float, float]:
        dense = {row.layer.key: row.keep for row in self.rows}
        changed = [c for c in self.as_timed(chosen) if c.chain is not None]
        # A goal of size may choose what could not be timed: nothing is known to be gained by it then.
        chains = (dense[c.key].cost("ms") if c.ms is None else c.ms for c in changed)
        return sum(dense[c.key].cost("ms") for c in changed), sum(chains)


def size_problem(rows: Sequence[Row], goal: Goal, of_total: float, factorable: float, times: float = 1.0) -> Problem:
    """The allocation problem of a goal of size; needs no latencies.

    Args:
        rows: The table.
        goal: KeepMacs or KeepParams.
        of_total: What its share is a share of.
        factorable: How much of that the factorable layers hold.
        times: Multiplies what may remain.
    """
    cost: Cost = "macs" if isinstance(goal, KeepMacs) else "params"
    budget = times * goal.value * of_total - (of_total - factorable)
    return Problem(tuple(row.options for row in rows if row.factorable), cost, budget)
