"""Prices of chains: each is lowered as it will be written, timed in front of what its layer stands in front of.

Chains of one layer take turns with the layer itself, in rounds, until their ratios are known. A price is the median
over the rounds of (chain / layer) times the layer's own latency, so that a busy or throttled machine shifts all prices
alike. Taking turns also empties the caches between two runs of the same chain. What is in the table is not timed
again. All this happens in a process of its own: a chain that it dies of has no price.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from onnx import TensorProto, helper

from onnx_lowrank.chain import Chain
from onnx_lowrank.latency.child import Child, MeasuringError, shared
from onnx_lowrank.latency.circumstances import Circumstances
from onnx_lowrank.latency.estimate import Interval
from onnx_lowrank.latency.measure import DISTURBED_SHARE, Until, steady_clock
from onnx_lowrank.latency.messages import Contest, Finished, Subject
from onnx_lowrank.latency.table import LatencyTable, Record
from onnx_lowrank.latency.work import in_words
from onnx_lowrank.layer import Layer, Site
from onnx_lowrank.micro_model import chain_model
from onnx_lowrank.plan import MEASURED
from onnx_lowrank.runtime import UnsupportedTypeError
from onnx_lowrank.target import Target

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
_UNTIL = Until(rounds=9, half_width=0.02, most=21, sample_s=0.001, resting=True)
_BUDGET_S = 1.0  # of each chain; an eighth at most warms up
ANCHORS = 4  # layers timed again to see how the machine has changed
OPEN_BYTES = 256 << 20  # weights of sessions held open at once; onnxruntime keeps about twice as much


@dataclass(frozen=True)
class Job:
    """A chain to be priced for a layer; None is the layer as it is."""

    layer: Layer
    chain: Chain | None = None


@dataclass(frozen=True)
class Dropped:
    """A chain that could not be timed, and why."""

    layer: Layer
    chain: Chain | None
    reason: str


@dataclass(frozen=True)
class _Piece:
    """One chain at one site: what is really timed."""

    key: str
    job: Job
    site: Site


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
        disturbed: How many of them other work disturbed.
        dropped: Chains without a price.
    """

    source: str
    timed: int
    disturbed: int
    dropped: list[Dropped]

    def price(self, jobs: Sequence[Job], progress: Progress | None = None) -> list[float | None]:
        """Milliseconds per run of the model for each job, None for a chain without a price."""
        ...

    def drift(self, layers: Sequence[Layer], model: Subject, model_ms: float, budget_s: float) -> float:
        """Latency of layers now over that in the table, where the model they are from takes `model_ms`."""
        ...


def chain_key(layer: Layer, chain: Chain | None, site: Site) -> str:
    """What is timed for a chain (None: the layer itself) at a site, for latency tables."""
    stages = chain.stages if chain is not None else None
    behind = ("Conv",) if site.before_conv else ()
    what = repr((layer.shape, layer.form, stages, site.input_shape, site.output_shape, *behind))
    return hashlib.sha256(what.encode()).hexdigest()


class ChainTimer:
    """Prices chains on one target.

    Args:
        target: Provider and threads; a float32 twin stands in where the provider lacks kernels for the layer's type.
        table: Where prices are kept between runs.
        level: Graph optimization level.
        child: The measuring process; None: the one that everything shares.

    Attributes:
        timed: Pieces (chain at a site) timed so far; 0 when everything was in the table.
        disturbed: Those of them that were timed beside other work on the machine.
        dropped: Chains that could not be timed.
    """

    source = MEASURED

    def __init__(self, target: Target, table: LatencyTable, level: str = "all", child: Child | None = None) -> None:
        self.target, self.table, self.level = target, table, level
        self.timed = self.disturbed = 0
        self.dropped: list[Dropped] = []
        self._child = child or shared()
        self._without_kernels: set[int] = set()
        self._clock, self._where = steady_clock(target), Circumstances.here(target, level)

    def price(self, jobs: Sequence[Job], progress: Progress | None = None) -> list[float | None]:
        """Milliseconds per run of the model for each job: the sum over the layer's sites of count times latency.

        Args:
            jobs: In any order; equal chains on equal shapes are timed once, whatever layers they belong to.
            progress: Called with (pieces done, pieces in all) after every batch.

        Returns:
            One price per job; None for a chain that could not be timed (see `dropped`).
        """
        pieces = [[self._piece(job, site) for site in job.layer.sites] for job in jobs]
        unique = {piece.key: piece for row in pieces for piece in row}
        known: dict[str, float | None] = {
            key: ms for key in unique if (ms := self.table.get(key, self._where)) is not None
        }
        for batch in self._batches([piece for key, piece in unique.items() if key not in known]):
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
        pieces = [[self._piece(job, site) for site in job.layer.sites] for job in jobs]
        unique = {piece.key: piece for row in pieces for piece in row}
        found: dict[str, Share] = {}
        for batch in self._batches(list(unique.values())):
            timed = self._measured(batch, replace(_UNTIL, budget_s=_BUDGET_S * len(batch)))
            if timed.paired is not None:
                kept = [piece for index, piece in enumerate(batch) if index not in timed.refused]
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
        pieces = [self._piece(Job(layer), site) for layer in costly for site in layer.sites]
        found = self._measured(pieces, replace(_UNTIL, budget_s=budget_s, resting=False), model)
        if found.paired is None or found.refused or before <= 0:
            return 1.0
        shares = zip(pieces, found.paired.ratios[1:], strict=True)
        return sum(piece.site.count / ratio for piece, ratio in shares) * model_ms / before

    def _piece(self, job: Job, site: Site) -> _Piece:
        return _Piece(chain_key(job.layer, job.chain, site), job, site)

    def _batches(self, pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
        """Pieces of equal layers on equal shapes, the layer itself in front, few enough to be open at once."""
        groups: dict[str, list[_Piece]] = {}
        for piece in pieces:
            own = self._piece(Job(piece.job.layer), piece.site)
            group = groups.setdefault(own.key, [own])
            if piece.key != own.key:
                group.append(piece)
        for own, *others in groups.values():
            batch, size = [own], _weight_bytes(own)
            for piece in others:
                if size + _weight_bytes(piece) > OPEN_BYTES and len(batch) > 1:
                    yield batch
                    batch, size = [own], _weight_bytes(own)
                batch.append(piece)
                size += _weight_bytes(piece)
            yield batch

    def _time(self, batch: Sequence[_Piece]) -> dict[str, float | None]:
        found = self._measured(batch, replace(_UNTIL, budget_s=_BUDGET_S * len(batch)))
        prices: dict[str, float | None] = {}
        for index, error in found.refused.items():
            piece = batch[index]
            reason = error.reason if isinstance(error, MeasuringError) else str(error)
            self.dropped.append(Dropped(piece.job.layer, piece.job.chain, reason))
            prices[piece.key] = None
        timed = [piece for index, piece in enumerate(batch) if index not in found.refused]
        if found.paired is None:
            return prices
        own_ms = found.paired.timings[0].median_ms
        # Prices of a layer timed in several batches, or in another run, share one scale: the layer's first latency.
        scale = (self._remembered(timed[0]) if timed[0].job.chain is None else None) or own_ms
        for piece, ratio in zip(timed, found.paired.ratios, strict=True):
            prices[piece.key] = ms = scale / ratio
            what = in_words(piece.job.layer, piece.job.chain, piece.site)
            self.table.put(self._where, Record(piece.key, what, ms, found.paired.rounds))
            logger.debug("%s %.3f ms", what, ms)
        self.timed += len(timed)
        self.disturbed += len(timed) if found.paired.disturbed_rounds > DISTURBED_SHARE else 0
        return prices

    def _measured(self, batch: Sequence[_Piece], until: Until, *first: Subject) -> Finished:
        """The batch in turns, behind what stands `first`; as float32 where the provider lacks kernels for its type."""
        subjects = [*first, *(self._subject(piece) for piece in batch)]
        found = self._child.contest(Contest(subjects, until, self._clock))
        lacking = {i - len(first) for i, error in found.refused.items() if isinstance(error, UnsupportedTypeError)}
        types = {batch[i].job.layer.form.elem_type for i in lacking if i >= 0}
        types -= self._without_kernels | {TensorProto.FLOAT}
        if not types:
            return found
        self._without_kernels |= types
        return self._measured(batch, until, *first)

    def _subject(self, piece: _Piece) -> Subject:
        kind = piece.job.layer.form.elem_type
        kind = TensorProto.FLOAT if kind in self._without_kernels else kind
        model = chain_model(piece.job.layer, piece.job.chain, piece.site, elem_type=kind)
        x = np.random.default_rng(0).standard_normal(piece.site.input_shape)
        feeds = {model.graph.input[0].name: x.astype(helper.tensor_dtype_to_np_dtype(kind))}
        return Subject(model.SerializeToString(), self.level, self.target, [(feeds, 1.0)])

    def _remembered(self, piece: _Piece) -> float | None:
        record = self.table.record(piece.key, self._where)
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


def _weight_bytes(piece: _Piece) -> int:
    chain = piece.job.chain
    return 4 * (piece.job.layer.shape.params if chain is None else chain.params)
