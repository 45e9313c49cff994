"""What is really timed: a chain at one site of its layer, and how many of them can be open at once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from onnx import helper

from onnx_lowrank.chain import Chain
from onnx_lowrank.latency.messages import Subject
from onnx_lowrank.latency.work import BYTES, work_of
from onnx_lowrank.layer import Layer, Site
from onnx_lowrank.micro_model import chain_model
from onnx_lowrank.target import Target

OPEN_BYTES = 2 << 30  # what sessions that are open at once may take, as `Piece.open_bytes` reckons it
_KEPT = 2  # weights are kept as they were read and as the kernels want them; activations are copied into layouts


@dataclass(frozen=True)
class Job:
    """A chain to be priced for a layer; None is the layer as it is."""

    layer: Layer
    chain: Chain | None = None


@dataclass(frozen=True)
class Piece:
    """One chain at one site."""

    job: Job
    site: Site

    @cached_property
    def key(self) -> str:
        """What it is called in latency tables."""
        return chain_key(self.job.layer, self.job.chain, self.site)

    @cached_property
    def own(self) -> Piece:
        """The layer itself at the site."""
        return Piece(Job(self.job.layer), self.site)

    @property
    def open_bytes(self) -> int:
        """About what a session takes that is ready to run it: weights and activations of every stage."""
        work = work_of(self.job.layer, self.job.chain, self.site)
        return round(_KEPT * BYTES[work.elem_type] * sum(step.values() for step in work.steps))

    def subject(self, target: Target, level: str, elem_type: int) -> Subject:
        """Its micro-model, ready to be timed."""
        model = chain_model(self.job.layer, self.job.chain, self.site, elem_type=elem_type)
        x = np.random.default_rng(0).standard_normal(self.site.input_shape)
        feeds = {model.graph.input[0].name: x.astype(helper.tensor_dtype_to_np_dtype(elem_type))}
        return Subject(model.SerializeToString(), level, target, [(feeds, 1.0)])


def as_timed(sites: Iterable[Site], provider: str) -> list[Site]:
    """Sites as a provider's chains are timed at: a convolution behind them on the CPU provider only.

    It is there for the sake of onnxruntime's blocked layout, which no other provider has; and OpenVINO, which sees that
    it reads one position, leaves out all others of the chain, too.
    """
    return [site if provider == "cpu" else replace(site, before_conv=False) for site in sites]


def chain_key(layer: Layer, chain: Chain | None, site: Site) -> str:
    """What is timed for a chain (None: the layer itself) at a site, for latency tables."""
    stages = chain.stages if chain is not None else None
    behind = ("Conv",) if site.before_conv else ()
    what = repr((layer.shape, layer.form, stages, site.input_shape, site.output_shape, *behind))
    return hashlib.sha256(what.encode()).hexdigest()


def batches(pieces: Sequence[Piece], most: int = OPEN_BYTES) -> Iterator[list[Piece]]:
    """Pieces of equal layers on equal shapes, the layer itself in front, few enough to be open at once."""
    groups: dict[str, list[Piece]] = {}
    for piece in pieces:
        group = groups.setdefault(piece.own.key, [piece.own])
        if piece.key != piece.own.key:
            group.append(piece)
    for own, *others in groups.values():
        batch, size = [own], own.open_bytes
        for piece in others:
            if size + piece.open_bytes > most and len(batch) > 1:
                yield batch
                batch, size = [own], own.open_bytes
            batch.append(piece)
            size += piece.open_bytes
        yield batch
