"""Prices of chains: each is lowered as it will be written, timed alone, and remembered.

Chains of one layer take turns with the layer itself, in rounds. A price is the median over the rounds of
(chain / layer) times the layer's own latency, so that a busy or throttled machine shifts all prices alike. Taking
turns also empties the caches between two runs of the same chain. What was in the table before is not timed again.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from onnx import TensorProto

from onnx_lowrank.chain import Chain
from onnx_lowrank.errors import LowRankError
from onnx_lowrank.latency.circumstances import Circumstances
from onnx_lowrank.latency.measure import steady_clock
from onnx_lowrank.latency.table import LatencyTable, Record
from onnx_lowrank.latency.turns import relative_to_first, sample
from onnx_lowrank.layer import Layer, Site
from onnx_lowrank.micro_model import chain_model
from onnx_lowrank.runtime import BoundRun, Session, UnsupportedTypeError, open_session
from onnx_lowrank.signature import Feeds
from onnx_lowrank.target import Target

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
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


class Pricer(Protocol):
    """What knows the prices of chains.

    Attributes:
        timed: Pieces (chain at a site) timed so far.
        dropped: Chains without a price.
    """

    timed: int
    dropped: list[Dropped]

    def price(self, jobs: Sequence[Job], progress: Progress | None = None) -> list[float | None]:
        """Milliseconds per run of the model for each job, None for a chain without a price."""
        ...


def chain_key(layer: Layer, chain: Chain | None, site: Site) -> str:
    """What is timed for a chain (None: the layer itself) at a site, for latency tables."""
    stages = chain.stages if chain is not None else None
    what = repr((layer.shape, layer.form, stages, site.input_shape, site.output_shape))
    return hashlib.sha256(what.encode()).hexdigest()


def in_words(layer: Layer, chain: Chain | None, site: Site) -> str:
    """The same for a reader."""
    dims = "x".join(map(str, site.input_shape))
    became = "" if chain is None else f": {chain.method} {' '.join('x'.join(map(str, s.weight)) for s in chain.stages)}"
    return f"{layer.form.op} {layer.shape} at {dims}{became}"


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
        samples = sample([bound for _, bound in opened], self._clock)
        first = opened[0][0]
        ratios = relative_to_first(samples)
        # Prices of a layer timed in several batches, or in another run, share one scale: the layer's first latency.
        scale = (self._remembered(first) if first.job.chain is None else None) or float(np.median(samples[:, 0])) * 1e3
        for (piece, _), ratio in zip(opened, ratios, strict=True):
            prices[piece.key] = ms = scale * float(ratio)
            what = in_words(piece.job.layer, piece.job.chain, piece.site)
            self.table.put(self._where, Record(piece.key, what, ms, len(samples)))
            logger.debug("%s %.3f ms", what, ms)
        self.timed += len(opened)
        return prices

    def _remembered(self, piece: _Piece) -> float | None:
        record = self.table.record(piece.key, self._where)
        return None if record is None else record.ms

    def _open(self, piece: _Piece) -> BoundRun:
        layer, chain = piece.job.layer, piece.job.chain
        try:
            model = chain_model(layer, chain, piece.site)
            session = open_session(model.SerializeToString(), self.target, self.level)
        except UnsupportedTypeError:
            twin = chain_model(layer, chain, piece.site, elem_type=TensorProto.FLOAT)
            session = open_session(twin.SerializeToString(), self.target, self.level)
        return session.bind(_feeds(session, piece.site))


def total(parts: Sequence[tuple[float, float | None]]) -> float | None:
    """Counts times prices, or None where a price is missing."""
    prices = [count * ms for count, ms in parts if ms is not None]
    return sum(prices) if len(prices) == len(parts) else None


def _feeds(session: Session, site: Site) -> Feeds:
    rng = np.random.default_rng(0)
    return {spec.name: rng.standard_normal(site.input_shape).astype(spec.dtype) for spec in session.signature.inputs}


def _weight_bytes(piece: _Piece) -> int:
    chain = piece.job.chain
    return 4 * (piece.job.layer.shape.params if chain is None else chain.params)
