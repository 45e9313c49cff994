"""Sequential refit: every chain is fitted to the original's outputs on the inputs the compressed network gives it.

Two copies of the network are walked through side by side, layer by layer in graph order. At a layer, c are the unfolded
inputs from the *compressed* network and y the outputs of the *original* one (Zhang et al., TPAMI 2016, section 3.2;
here for every chain, not only the two-stage one), so that a layer repairs what the layers before it lost. Where y is
added to the other branch of a residual sum, it is the *sum* that shall be right. Layers that are not factored keep
their weights. `regression` does one layer.
"""

from __future__ import annotations

import functools
import logging
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np

from onnx_lowrank.calibration.layer_data import Block, LayerData
from onnx_lowrank.calibration.samples import Samples
from onnx_lowrank.calibration.stops import Stop, stops
from onnx_lowrank.calibration.unfold import Fed, Unfolding, rows_per_sample
from onnx_lowrank.calibration.walk import Cut, Front, Values, route
from onnx_lowrank.chain import Fit
from onnx_lowrank.decomposition import Decomposition, Factorization
from onnx_lowrank.graph.keys import traceable
from onnx_lowrank.graph.layers import layers
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.layer import Array, Layer
from onnx_lowrank.plan import Plan
from onnx_lowrank.regression import Chosen, Refitted, fit_chain
from onnx_lowrank.rewrite import Replacement, splice
from onnx_lowrank.row_space import RowSpace
from onnx_lowrank.target import Target

logger = logging.getLogger(__name__)
Progress = Callable[[int, int], None]


def chosen_layers(
    layers: Iterable[Layer],
    plan: Plan,
    methods: Mapping[str, Decomposition],
    known: Mapping[tuple[str, str], Factorization] = MappingProxyType({}),
) -> list[Chosen]:
    """What a plan makes of those of `layers` that it factors.

    Args:
        layers: The layers.
        plan: The plan.
        methods: Decompositions by name.
        known: Factorizations of their weights by layer key and method, where there are some.
    """
    choices = {choice.key: choice for choice in plan.layers if not choice.keeps}
    named = ((layer, choices[layer.key]) for layer in layers if layer.key in choices)
    return [Chosen(layer, methods[choice.method], choice.rank, known) for layer, choice in named]


def refit(
    graph: Graph,
    chosen: Sequence[Chosen],
    samples: Samples,
    target: Target,
    folder: Path,
    progress: Progress,
    *,
    regress: bool = True,
) -> dict[str, Refitted]:
    """Fit every chain, in graph order.

    Args:
        graph: The normalized model; it is not changed.
        chosen: The layers that are factored, and what they become.
        samples: To fit and to judge.
        target: Where to run.
        folder: For activations, while it runs.
        progress: Told how many layers are done.
        regress: Fit to the original's outputs; else only approximate the weights on the inputs that come.

    Returns:
        Layer key -> its fit; layers that cannot be refitted (inside bodies, weights shared by several nodes, a bias
        that is computed) are not in it and stay data-free.
    """
    found: dict[str, Refitted] = {}
    if not chosen:
        return found
    twin = _twin(graph)
    with tempfile.TemporaryDirectory(prefix="refit-", dir=folder) as room:
        walk = _Walk(graph, twin, chosen, samples, target, Path(room), regress=regress)
        for number in range(len(walk.path.cuts)):
            found.update(walk.step(number))
            progress(number + 1, len(walk.path.cuts))
    return found


def arrays(found: Mapping[str, Refitted]) -> dict[str, Fit]:
    """What `Factor` needs of a refit."""
    return {key: one.fit for key, one in found.items()}


class _Walk:
    """Both networks between two layers."""

    def __init__(
        self,
        original: Graph,
        compressed: Graph,
        chosen: Sequence[Chosen],
        samples: Samples,
        target: Target,
        folder: Path,
        *,
        regress: bool,
    ) -> None:
        self.original, self.compressed, self.samples, self.regress = original, compressed, samples, regress
        self.chosen = {one.layer.key: one for one in chosen}
        # Every layer is stopped at, fitted or not: what is carried is then what `affordable` has found room for.
        found = stops(original, layers(original, check=False)[0], samples.memory_limit)
        self.stops = {key: stop for key, stop in found.items() if self._fittable(stop)}
        self.path = route(original, {key: stop.operand for key, stop in found.items()})
        fitted = {self.stops[cut.key].layer.key for cut in self.path.cuts if cut.key in self.stops}
        rest = [one for one in chosen if one.layer.key not in fitted]
        splice(compressed, [_replacement(one, Fit(one.factors(one.layer.read()))) for one in rest])
        self.fronts = (Front(_made(folder / "original"), target), Front(_made(folder / "compressed"), target))
        self.fits: list[bool] = []
        self.fed: list[Fed] = []
        for feeds, fits, count in samples.batches():
            self.fits.append(fits)
            self.fed.append(Fed(count, samples.counted(feeds)))
            for front in self.fronts:
                front.put(feeds)
        for front, network in zip(self.fronts, (original, compressed), strict=True):
            front.advance(network, self.path.fronts[0])

    def _fittable(self, stop: Stop) -> bool:
        """Whether moments tell what the layer's chain needs; those in a row space say too little for most formats."""
        one = self.chosen.get(stop.layer.key)
        return one is not None and (not stop.in_row_space or one.method.whole_rows)

    def step(self, number: int) -> dict[str, Refitted]:
        """Fit what one layer becomes, put it into the compressed network, and move on."""
        cut, front = self.path.cuts[number], self.path.fronts[number + 1]
        stop = self.stops.get(cut.key)
        if stop is None:
            self.fronts[0].advance(self.original, front)
            self.fronts[1].advance(self.compressed, front)
            return {}
        one = self.chosen[stop.layer.key]
        channels = one.layer.shape.groups * one.layer.shape.out
        inside = None if stop.slot is None else stop.slot.inside(channels)
        space = stop.space
        result = fit_chain(
            one if space is None else one.in_space(space),
            self._data(cut, one, front, space),
            inside,
            regress=self.regress,
        )
        if space is not None:
            fit = replace(result.fit, factors=space.widened(result.fit.factors, one.chain))
            result = replace(result, fit=fit)
        logger.info("%s: %s, error %.4f -> %.4f", cut.key, result.what, result.error_before, result.error)
        splice(self.compressed, [_replacement(one, result.fit)])
        self.fronts[1].advance(self.compressed, front)
        return {one.layer.key: result}

    def _data(self, cut: Cut, one: Chosen, front: Sequence[str], space: RowSpace | None) -> LayerData:
        """Inputs in the compressed and wanted outputs from the original network; the original moves on."""
        shape, seen = one.layer.shape, None if space is None else space.shape.inputs
        unfolding = Unfolding(one.layer.form, shape, rows_per_sample(shape, len(self.samples.fit), seen))
        blocks: dict[bool, list[Block]] = {True: [], False: []}
        relu = cut.relu

        def hear(batch: int, y: Values) -> None:
            nonlocal relu
            if len({held.shape(cut.x, batch) for held in self.fronts}) > 1:
                return  # shapes that depend on values: no row has a counterpart
            wanted, beside, fed = y, None, self.fed[batch]
            if cut.beside is not None:
                before, now = (held.value(cut.beside, batch) for held in self.fronts)
                if before.shape == now.shape and np.broadcast_shapes(before.shape, y.shape) == y.shape:
                    over = np.broadcast_to(now, y.shape)
                    wanted, beside = y + before, unfolding.targets(over, fed.counted, fed.samples)
                else:  # y is added to each of several positions: what the ReLU lets through is not y's to know
                    relu = False

            def inputs() -> Array:
                rows = unfolding.rows(self.fronts[1].value(cut.x, batch), fed.counted, fed.samples)
                return rows if space is None else space.seen(rows)

            if not self.fits[batch]:
                inputs = functools.cache(inputs)  # judged by many times, and few

            targets = unfolding.targets(wanted, fed.counted, fed.samples)
            blocks[self.fits[batch]].append(Block(inputs, targets, beside))

        self.fronts[0].advance(self.original, front, cut.y, hear)
        return LayerData(blocks[True], blocks[False], relu)


def _twin(graph: Graph) -> Graph:
    """A copy in which every node is named by its key, so that keys stay what they are while other nodes go."""
    twin = Graph(traceable(graph), graph.folder, graph.external)
    for scope in twin.scopes():
        scope.path = ""
    return twin


def _replacement(one: Chosen, fit: Fit) -> Replacement:
    return Replacement(one.layer, one.chain, fit, {})


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder
