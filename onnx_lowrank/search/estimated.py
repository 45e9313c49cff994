"""A device that is not here, known by a roofline alone: everything is estimated, nothing was measured.

A whole model takes the sum of its layers, priced as chains are, and of all other nodes: what they move, and where their
multiply-accumulates are known these too. Activations behind a layer are free, as are operators that only rename data
and computations of shapes. Models are normalized first, as runtimes fold most of that themselves: no speedup is claimed
for it. Other fusions are not known here: whole models look slower than they are, and the speedup of the layers smaller.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from onnx_lowrank.graph import io
from onnx_lowrank.graph.keys import keyed_nodes
from onnx_lowrank.graph.layers import layers
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.latency.chains import Dropped, Progress
from onnx_lowrank.latency.grid import Kind
from onnx_lowrank.latency.measure import Paired, Timing
from onnx_lowrank.latency.messages import Subject
from onnx_lowrank.latency.pieces import Job
from onnx_lowrank.latency.roofline import Features, Roofline
from onnx_lowrank.latency.turns import Clock
from onnx_lowrank.latency.work import FLOAT32, OpClass, elem_type_of, work_of
from onnx_lowrank.layer import Layer, NodeShapes
from onnx_lowrank.pass_manager import PassManager
from onnx_lowrank.passes.normalize import DEFAULT_NORMALIZE
from onnx_lowrank.plan import ESTIMATED
from onnx_lowrank.search.racer import Contestant, Racer, Sample
from onnx_lowrank.search.survey import trace
from onnx_lowrank.target import InputShapes, Target

_FREE = {"Constant", "Dropout", "Flatten", "Identity", "Reshape", "Shape", "Squeeze", "Unsqueeze"}
_SMALL = 16  # numbers: what an operator gives that computes shapes


@dataclass(frozen=True)
class Estimated:
    """The device planned for; see `Device`.

    Args:
        roofline: What is known of it.
    """

    roofline: Roofline

    @property
    def label(self) -> str:
        """Says that it is estimated."""
        return self.roofline.label

    @property
    def source(self) -> str:
        """For messages."""
        return f"estimates of {self.roofline.device}"

    def block(self, kind: Kind) -> int:
        """The channel block there."""
        return self.roofline.blocks[kind]

    def pricer(self, level: str) -> EstimatedPrices:
        """The same at every optimization level."""
        del level
        return EstimatedPrices(self.roofline)

    def racer(self, target: Target, samples: Sequence[Sample], folder: Path, *, as_float32: bool) -> Racer:
        """Estimates of whole models."""
        return EstimatedRaces(target, samples, folder, as_float32=as_float32, roofline=self.roofline)

    def planning(self, shapes: tuple[InputShapes, ...]) -> Target:
        """The CPU here, which runs the model to see its shapes and its errors."""
        return Target(levels=("all",), shapes=shapes)


class EstimatedPrices:
    """Prices of chains by a roofline. See `ChainTimer` for the rest."""

    source = ESTIMATED

    def __init__(self, roofline: Roofline) -> None:
        self._roofline = roofline
        self.timed = self.priced = self.disturbed = 0
        self.dropped: list[Dropped] = []

    def price(self, jobs: Sequence[Job], progress: Progress | None = None) -> list[float | None]:
        """Estimated milliseconds per run of the model for each job, without the convolution that timing puts behind."""
        pieces = [(i, replace(s, before_conv=False)) for i, job in enumerate(jobs) for s in job.layer.sites]
        works = [work_of(jobs[index].layer, jobs[index].chain, site) for index, site in pieces]
        prices = [0.0] * len(jobs)
        for (index, site), ms in zip(pieces, self._roofline.times(Features.of(works)), strict=True):
            prices[index] += site.count * float(ms)
        if progress is not None:
            progress(len(jobs), len(jobs))
        return list(prices)

    def drift(self, layers: Sequence[Layer], model: Subject, model_ms: float, budget_s: float) -> float:
        """1: whole models are estimated by the same numbers."""
        del layers, model, model_ms, budget_s
        return 1.0


@dataclass(kw_only=True)
class EstimatedRaces(Racer):
    """What `Racer` would find out, by a roofline.

    Args:
        roofline: Of the device.
    """

    roofline: Roofline

    def best_level(self, path: Path) -> Contestant:
        """The only one: optimization levels are not told apart."""
        return Contestant(path, self.target.levels[0])

    def gains(self, path: Path, variant: Path) -> bool:
        """Whether the variant is estimated to be faster."""
        return self.model_ms(variant) < self.model_ms(path)

    def race(self, contestants: Sequence[Contestant], seconds: float | None = None) -> Paired:
        """Estimates as a race of one round, without an interval."""
        del seconds
        found = [self.model_ms(contestant.path) for contestant in contestants]
        ratios = tuple(found[0] / ms for ms in found)
        timings = tuple(Timing(ms, (ms, ms), (ms,)) for ms in found)
        return Paired(timings, ratios, tuple((r, r) for r in ratios), 1, Clock.WALL, disturbed=False)

    def model_ms(self, path: Path) -> float:
        """Estimated milliseconds of one run of a model."""
        graph = io.load(path)
        PassManager(DEFAULT_NORMALIZE).run(graph)
        traced = trace(graph, self, self.folder)
        found, kept = layers(graph, traced, check=False)
        jobs = [Job(layer) for layer in found]
        prices = EstimatedPrices(self.roofline).price(jobs)
        kinds = [elem_type_of(layer) for layer in found]
        kind = max(kinds, key=kinds.count, default=FLOAT32)
        macs = sum(2e3 * node.macs / self.roofline.rate(_op_class(node.op), kind) for node in kept)
        priced = {node for layer in found for node in layer.nodes}
        free = set(_fused(graph, found))
        moved = sum(
            shapes.count * self.roofline.moved_ms(_values(shapes), kind)
            for _, node, key in keyed_nodes(graph)
            if key not in priced and node.op_type not in _FREE and id(node) not in free
            for shapes in traced.get(key, ())
            if any(math.prod(shape) > _SMALL for shape in shapes.output_shapes)
        )
        return math.fsum([*(price or 0.0 for price in prices), macs, moved])


def _fused(graph: Graph, found: Sequence[Layer]) -> Iterator[int]:
    """Ids of the activations that a runtime fuses with the layer before them."""
    activated = {key for layer in found if layer.form.activation for key in layer.nodes}
    for scope, node, key in keyed_nodes(graph):
        user = scope.sole_consumer(node.output[0]) if key in activated else None
        if user is not None:
            yield id(user)


def _values(shapes: NodeShapes) -> int:
    return sum(math.prod(shape) for shape in (*shapes.input_shapes, *shapes.output_shapes))


def _op_class(op: str) -> OpClass:
    """Of a kept operator: its convolutions are depthwise nearly always."""
    classes: dict[str, OpClass] = {"Conv": "conv grouped", "ConvTranspose": "conv"}
    return classes.get(op, "matmul")
