"""Prices of chains: each is lowered as it will be written, timed in front of what its layer stands in front of.

Chains of one layer take turns with the layer itself, in rounds, until their ratios are known. A price is the median
over the rounds of (chain / layer) times the layer's own latency, so that a busy or throttled machine shifts all prices
alike. Taking turns also empties the caches between two runs of the same chain. What is in the table is not timed
again. All this happens in a process of its own: a chain that it dies of has no price.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from onnx import TensorProto

from onnx_lowrank.chain import Chain
from onnx_lowrank.latency.child import Child, CrowdedError, MeasuringError, shared
from onnx_lowrank.latency.circumstances import Circumstances
from onnx_lowrank.latency.estimate import Interval
from onnx_lowrank.latency.measure import DISTURBED_SHARE, Until, steady_clock
from onnx_lowrank.latency.messages import Contest, Finished, Subject
from onnx_lowrank.latency.pieces import Job, Piece, as_timed, batches
from onnx_lowrank.latency.table import LatencyTable, Record
from onnx_lowrank.latency.work import in_words
from onnx_lowrank.layer import Layer
from onnx_lowrank.plan import MEASURED
from onnx_lowrank.runtime import UnsupportedTypeError
from onnx_lowrank.target import Target

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
_UNTIL = Until(rounds=9, half_width=0.02, most=21, sample_s=0.001, resting=True)
_BUDGET_S = 1.0  # of each chain; an eighth at most warms up
ANCHORS = 4  # layers timed again to see how the machine has changed


@dataclass(frozen=True)
class Dropped:
    """A chain that could not be timed, and why."""

    layer: Layer
    chain: Chain | None
    reason: str


@dataclass(frozen=True)
class Share:
    """Latency of a chain, beside its layer.

    Args:
        layer_ms: Of the layer alone, per run of the model.
        of_layer: Of the chain, as a share of it: median of neighbouring runs.
        ci95: 95 % interval of the share.
    """

    layer_ms: float
    of_layer: float
    ci95: Interval


class Pricer(Protocol):
    """What knows the prices of chains.

    Attributes:
        source: Whether they are "measured" or "estimated".
        timed: Pieces (chain at a site) timed so far.
        priced: Pieces whose price was asked for so far, timed now or before.
        disturbed: How many of these were timed beside other work on the machine.
        dropped: Chains without a price.
    """

    source: str
    timed: int
    priced: int
    disturbed: int
    dropped: list[Dropped]

    def price(self, jobs: Sequence[Job], progress: Progress | None = None) -> list[float | None]:
        """Milliseconds per run of the model for each job, None for a chain without a price."""
        ...

    def drift(self, layers: Sequence[Layer], model: Subject, model_ms: float, budget_s: float) -> float:
        """Latency of layers now over that in the table, where the model they are from takes `model_ms`."""
        ...


class ChainTimer:
    """Prices chains on one target.

    Args:
        target: Provider and threads; a float32 twin stands in where the provider lacks kernels for the layer's type.
        table: Where prices are kept between runs.
        level: Graph optimization level.
        child: The measuring process; None: the one that everything shares.

    Attributes:
        where: Circumstances that prices are put into the table under.
        timed: Pieces (chain at a site) timed so far; 0 when everything was in the table.
        priced: Pieces whose price was asked for so far, timed now or before.
        disturbed: Those of them that were timed beside other work on the machine.
        dropped: Chains that could not be timed.
    """

    source = MEASURED

    def __init__(self, target: Target, table: LatencyTable, level: str = "all", child: Child | None = None) -> None:
        self.target, self.table, self.level = target, table, level
        self.timed = self.priced = self.disturbed = 0
        self.dropped: list[Dropped] = []
        self._used: dict[str, bool] = {}
        self._now: set[str] = set()
        self._child = child or shared()
        self._without_kernels: set[int] = set()
        self._clock, self.where = steady_clock(target), Circumstances.here(target, level)

    def price(self, jobs: Sequence[Job], progress: Progress | None = None) -> list[float | None]:
        """Milliseconds per run of the model for each job: the sum over the layer's sites of count times latency.

        Args:
            jobs: In any order; equal chains on equal shapes are timed once, whatever layers they belong to.
            progress: Called with (pieces done, pieces in all) after every batch.

        Returns:
            One price per job; None for a chain that could not be timed (see `dropped`).
        """
        pieces = [self._pieces(job) for job in jobs]
        unique = {piece.key: piece for row in pieces for piece in row}
        # A chain's price is on the scale of its layer's: what is left of a layer that was forgotten is timed anew.
        records = [record for piece in unique.values() if (record := self._held(piece)) and self._held(piece.own)]
        known: dict[str, float | None] = {record.key: record.ms for record in records}
        self._note(records)
        for batch in batches([piece for key, piece in unique.items() if key not in known]):
            known |= self._time(batch)
            if progress is not None:
                progress(len(known), len(unique))
        return [total([(piece.site.count, known[piece.key]) for piece in row]) for row in pieces]

    def shares(self, jobs: Sequence[Job], progress: Progress | None = None) -> list[Share | None]:
        """Latency of each chain as a share of its layer's, timed now: what was in the table does not count.

        Where a layer is applied at several sites the bounds of the sum are the sums of the bounds.

        Args:
            jobs: In any order.
            progress: Called with (pieces done, pieces in all) after every batch.

        Returns:
            One per job; None for a chain that could not be timed.
        """
        pieces = [self._pieces(job) for job in jobs]
        unique = {piece.key: piece for row in pieces for piece in row}
        found: dict[str, Share] = {}
        for batch in batches(list(unique.values())):
            for part, timed in self._measured(batch):
                if timed.paired is not None:
                    kept = [piece for index, piece in enumerate(part) if index not in timed.refused]
                    own_ms = timed.paired.timings[0].median_ms
                    for piece, ratio, (low, high) in zip(kept, timed.paired.ratios, timed.paired.ci95, strict=True):
                        found[piece.key] = Share(own_ms, 1 / ratio, (1 / high, 1 / low))
            if progress is not None:
                progress(len(found), len(unique))
        return [_summed([(piece.site.count, found.get(piece.key)) for piece in row]) for row in pieces]

    def drift(self, layers: Sequence[Layer], model: Subject, model_ms: float, budget_s: float) -> float:
        """Latency of layers now over that in the table: by the costliest few, in turns with the model they are from.

        Args:
            layers: Priced ones.
            model: The whole model.
            model_ms: Its latency, on the scale that prices are wanted on.
            budget_s: Wall clock, opening excluded.

        Returns:
            1 where nothing can be said.
        """
        costs = dict(zip([layer.key for layer in layers], self.price([Job(layer) for layer in layers]), strict=True))
        costly = sorted(layers, key=lambda layer: costs[layer.key] or 0.0)[-ANCHORS:]
        before = sum(costs[layer.key] or 0.0 for layer in costly)
        pieces = [piece for layer in costly for piece in self._pieces(Job(layer))]
        try:
            found = self._contest(pieces, replace(_UNTIL, budget_s=budget_s, resting=False), model)
        except CrowdedError:
            return 1.0
        if found.paired is None or found.refused or before <= 0:
            return 1.0
        shares = zip(pieces, found.paired.ratios[1:], strict=True)
        return sum(piece.site.count / ratio for piece, ratio in shares) * model_ms / before

    def _pieces(self, job: Job) -> list[Piece]:
        return [Piece(job, site) for site in as_timed(job.layer.sites, self.target.provider)]

    def _time(self, batch: Sequence[Piece]) -> dict[str, float | None]:
        prices: dict[str, float | None] = {}
        for part, found in self._measured(batch):
            prices |= self._prices(part, found)
        return prices

    def _prices(self, part: Sequence[Piece], found: Finished) -> dict[str, float | None]:
        """Prices of pieces that ran in turns, put into the table; pieces that did not run have none."""
        prices: dict[str, float | None] = {}
        for index, error in found.refused.items():
            piece = part[index]
            reason = error.reason if isinstance(error, MeasuringError) else str(error)
            self.dropped.append(Dropped(piece.job.layer, piece.job.chain, reason))
            prices[piece.key] = None
        timed = [piece for index, piece in enumerate(part) if index not in found.refused]
        if found.paired is None:
            return prices
        own_ms = found.paired.timings[0].median_ms
        # Prices of a layer timed in several batches, or in another run, share one scale: the layer's first latency.
        scale = (self._remembered(timed[0]) if timed[0].job.chain is None else None) or own_ms
        busy = found.paired.disturbed_rounds > DISTURBED_SHARE
        for piece, ratio in zip(timed, found.paired.ratios, strict=True):
            prices[piece.key] = ms = scale / ratio
            if piece.job.chain is None and (held := self._held(piece)):  # it is as when it was timed first
                self._note([held])
                continue
            what = in_words(piece.job.layer, piece.job.chain, piece.site)
            record = Record(piece.key, what, ms, found.paired.rounds, disturbed=busy)
            self.table.put(self.where, record)
            self._note([record])
            self._now.add(piece.key)
            logger.debug("%s %.3f ms", what, ms)
        self.timed = len(self._now)
        return prices

    def _measured(self, batch: Sequence[Piece]) -> list[tuple[Sequence[Piece], Finished]]:
        """The batch in turns; in two halves, each behind the layer, and so on, where memory is too small for all."""
        try:
            return [(batch, self._contest(batch, replace(_UNTIL, budget_s=_BUDGET_S * len(batch))))]
        except CrowdedError:
            own, *others = batch
            half = (len(others) + 1) // 2
            logger.info("%d chains do not fit into memory together: half of them at once", len(others))
            return [*self._measured([own, *others[:half]]), *self._measured([own, *others[half:]])]

    def _contest(self, batch: Sequence[Piece], until: Until, *first: Subject) -> Finished:
        """The batch in turns, behind what stands `first`; as float32 where the provider lacks kernels for its type.

        Raises:
            CrowdedError: if memory runs out with several of them open.
        """
        kinds = [piece.job.layer.form.elem_type for piece in batch]
        kinds = [TensorProto.FLOAT if kind in self._without_kernels else kind for kind in kinds]
        own = [piece.subject(self.target, self.level, kind) for piece, kind in zip(batch, kinds, strict=True)]
        found = self._child.contest(Contest([*first, *own], until, self._clock), divisible=True)
        lacking = {i - len(first) for i, error in found.refused.items() if isinstance(error, UnsupportedTypeError)}
        types = {batch[i].job.layer.form.elem_type for i in lacking if i >= 0}
        types -= self._without_kernels | {TensorProto.FLOAT}
        if not types:
            return found
        self._without_kernels |= types
        return self._contest(batch, until, *first)

    def _note(self, records: Sequence[Record]) -> None:
        """Count what prices were taken from."""
        self._used |= {record.key: record.disturbed for record in records}
        self.priced, self.disturbed = len(self._used), sum(self._used.values())

    def _held(self, piece: Piece) -> Record | None:
        """What the table says of it, if it could be timed."""
        record = self.table.record(piece.key, self.where)
        return None if record is None or record.ms is None else record

    def _remembered(self, piece: Piece) -> float | None:
        record = self._held(piece)
        return None if record is None else record.ms


def total(parts: Sequence[tuple[float, float | None]]) -> float | None:
    """Counts times prices, or None where a price is missing."""
    prices = [count * ms for count, ms in parts if ms is not None]
    return sum(prices) if len(prices) == len(parts) else None


def _summed(parts: Sequence[tuple[float, Share | None]]) -> Share | None:
    """The share of all sites together, or None where one is missing."""
    known = [(count * share.layer_ms, share) for count, share in parts if share is not None]
    if len(known) < len(parts) or not known:
        return None
    whole = sum(ms for ms, _ in known)
    value, low, high = (
        sum(ms * bound for (ms, _), bound in zip(known, bounds, strict=True)) / whole
        for bounds in zip(*((share.of_layer, *share.ci95) for _, share in known), strict=True)
    )
    return Share(whole, value, (low, high))
