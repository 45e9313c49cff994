"""Prices of chains: each is lowered as it will be written, timed alone, and remembered.

Chains of one layer take turns with the layer itself, in rounds. A price is the median over the rounds of
(chain / layer) times the layer's own latency, so that a busy or throttled machine shifts all prices alike. Taking
turns also empties the caches between two runs of the same chain. What was in the table before is not timed again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from onnx_lowrank.chain import Chain
from onnx_lowrank.errors import LowRankError
from onnx_lowrank.latency.measure import Clock, one_round, seconds, steady_clock, warm_up
from onnx_lowrank.latency.table import LatencyTable, table_key
from onnx_lowrank.layer import Layer, Site
from onnx_lowrank.micro_model import chain_model
from onnx_lowrank.runtime import BoundRun, Session, UnsupportedTypeError, open_session
from onnx_lowrank.signature import Feeds
from onnx_lowrank.target import Target

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
_ROUNDS = 7
_WARM_UP_S = 0.05
_SHORTEST_S = 0.001  # a sample shorter than this is the mean of several runs
_MOST_RUNS = 20
_OPEN_BYTES = 256 << 20  # weights of sessions held open at once; onnxruntime keeps about twice as much


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


class ChainTimer:
    """Prices chains on one target.

    Args:
        target: Provider and threads; a float32 twin stands in where the provider lacks kernels for the layer's type.
        table: Where prices are kept between runs.
        level: Graph optimization level.

    Attributes:
        timed: Pieces (chain at a site) timed so far; 0 when everything was in the table.
        dropped: Chains that could not be timed.
    """

    def __init__(self, target: Target, table: LatencyTable, level: str = "all") -> None:
        self.target, self.table, self.level = target, table, level
        self.timed = 0
        self.dropped: list[Dropped] = []
        self._clock = steady_clock(target)

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
        known: dict[str, float | None] = {key: ms for key in unique if (ms := self.table.get(key)) is not None}
        for batch in self._batches([piece for key, piece in unique.items() if key not in known]):
            known |= self._time(batch)
            if progress is not None:
                progress(len(known), len(unique))
        return [_total([(piece.site.count, known[piece.key]) for piece in row]) for row in pieces]

    def _piece(self, job: Job, site: Site) -> _Piece:
        stages = job.chain.stages if job.chain is not None else None
        what = repr((job.layer.shape, job.layer.form, stages, site.input_shape, site.output_shape, self._clock.value))
        return _Piece(table_key(what, self.target, self.level), job, site)

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
                if size + _weight_bytes(piece) > _OPEN_BYTES and len(batch) > 1:
                    yield batch
                    batch, size = [own], _weight_bytes(own)
                batch.append(piece)
                size += _weight_bytes(piece)
            yield batch

    def _time(self, batch: Sequence[_Piece]) -> dict[str, float | None]:
        opened: list[tuple[_Piece, BoundRun]] = []
        prices: dict[str, float | None] = {}
        for piece in batch:
            try:
                opened.append((piece, self._open(piece)))
            except LowRankError as error:
                self.dropped.append(Dropped(piece.job.layer, piece.job.chain, str(error)))
                prices[piece.key] = None
        if not opened:
            return prices
        samples = _sample([bound for _, bound in opened], self._clock)
        first = opened[0][0]
        ratios = np.median(samples / samples[:, :1], axis=0)
        # Prices of a layer timed in several batches, or in another run, share one scale: the layer's first latency.
        scale = (self._remembered(first) if first.job.chain is None else None) or float(np.median(samples[:, 0])) * 1e3
        for (piece, _), ratio in zip(opened, ratios, strict=True):
            prices[piece.key] = ms = scale * float(ratio)
            layer, stages = piece.job.layer, piece.job.chain.stages if piece.job.chain else ()
            what = f"{layer.form.op} {layer.shape} at {piece.site.input_shape}: {[stage.weight for stage in stages]}"
            self.table.put(piece.key, ms, len(samples), what)
            logger.debug("%s %.3f ms", what, ms)
        self.timed += len(opened)
        return prices

    def _remembered(self, piece: _Piece) -> float | None:
        hits, misses = self.table.hits, self.table.misses
        remembered = self.table.get(piece.key)
        self.table.hits, self.table.misses = hits, misses  # nobody asked for this price
        return remembered

    def _open(self, piece: _Piece) -> BoundRun:
        layer, chain = piece.job.layer, piece.job.chain
        try:
            model = chain_model(layer, chain, piece.site)
            session = open_session(model.SerializeToString(), self.target, self.level)
        except UnsupportedTypeError:
            twin = chain_model(layer, chain, piece.site, elem_type=TensorProto.FLOAT)
            session = open_session(twin.SerializeToString(), self.target, self.level)
        return session.bind(_feeds(session, piece.site))


def _total(parts: Sequence[tuple[float, float | None]]) -> float | None:
    prices = [count * ms for count, ms in parts if ms is not None]
    return sum(prices) if len(prices) == len(parts) else None


def _sample(bound: Sequence[BoundRun], clock: Clock) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Seconds, rounds x sessions."""
    warm_up(bound, _WARM_UP_S * len(bound))
    runs = {id(run): _runs_per_sample(seconds(run, clock)) for run in bound}

    def mean(run: BoundRun) -> float:
        return sum(seconds(run, clock) for _ in range(runs[id(run)])) / runs[id(run)]

    return np.array([one_round(bound, mean, backward=number % 2 == 1) for number in range(_ROUNDS)])


def _runs_per_sample(one_run_s: float) -> int:
    return min(_MOST_RUNS, max(1, math.ceil(_SHORTEST_S / max(one_run_s, 1e-9))))


def _feeds(session: Session, site: Site) -> Feeds:
    rng = np.random.default_rng(0)
    return {spec.name: rng.standard_normal(site.input_shape).astype(spec.dtype) for spec in session.signature.inputs}


def _weight_bytes(piece: _Piece) -> int:
    chain = piece.job.chain
    return 4 * (piece.job.layer.shape.params if chain is None else chain.params)
