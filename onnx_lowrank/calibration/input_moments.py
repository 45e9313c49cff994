"""Moments of what the layers of a network read, from one walk: one set per tensor, not per layer.

Those in the row space of a weight are that layer's own.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from onnx_lowrank.calibration.moments import Accumulator, Moments
from onnx_lowrank.calibration.samples import Samples
from onnx_lowrank.calibration.stops import Stop, stops
from onnx_lowrank.calibration.unfold import Fed, Unfolding, rows_per_sample
from onnx_lowrank.calibration.walk import Front, Route, route
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.layer import Array, Layer
from onnx_lowrank.row_space import SeenInputs
from onnx_lowrank.target import Target

# A few inputs of a layer: how many, from how many positions of a sample at least, and what they may take.
SEEN_INPUTS, SEEN_POSITIONS, SEEN_BYTES = 256, 16, 1 << 27


class InputMoments:
    """Moments of every stop's input; where layers read a tensor in the same way they share them.

    Args:
        found: Stops by node key.
        path: The walk.
        samples: How many are fitted on.
    """

    def __init__(self, found: Mapping[str, Stop], path: Route, samples: int) -> None:
        self._stops, self._path, self._samples = found, path, samples
        self._held: dict[tuple[str, Hashable], Moments] = {}

    def at(self, number: int, front: Front, fitting: Mapping[int, Fed]) -> Moments:
        """Moments of what cut `number` reads; what no later cut reads is forgotten.

        Args:
            number: Position among the route's cuts.
            front: Holds the tensor.
            fitting: Batches to take them from, and what is in them.
        """
        cut = self._path.cuts[number]
        stop = self._stops[cut.key]
        layer, space = stop.layer, stop.space
        shape = layer.shape if space is None else space.shape
        unfolding = Unfolding(layer.form, layer.shape, rows_per_sample(layer.shape, self._samples, shape.inputs))
        key = (cut.x, unfolding.reading if space is None else layer.key)
        if key not in self._held:
            sums = Accumulator(shape.groups, shape.inputs)
            for batch, fed in fitting.items():
                rows = unfolding.rows(front.value(cut.x, batch), fed.counted, fed.samples)
                sums.add(rows if space is None else space.seen(rows))
            self._held[key] = sums.moments()
        moments = self._held[key]
        read = {later.x for later in self._path.cuts[number + 1 :]}
        self._held = {held: found for held, found in self._held.items() if held[0] in read}
        return moments

    def seen(self, number: int, front: Front, fitting: Mapping[int, Fed]) -> SeenInputs | None:
        """A few inputs of what stands behind cut `number`, as for `at`; None where there are moments of all inputs."""
        cut = self._path.cuts[number]
        stop = self._stops[cut.key]
        if not stop.in_row_space:
            return None
        layer, shape = stop.layer, stop.layer.shape
        most = max(min(SEEN_INPUTS, SEEN_BYTES // (4 * shape.groups * shape.inputs)), 1)
        rng, share = np.random.default_rng(0), most / max(sum(fed.samples for fed in fitting.values()), 1)
        found: list[Array] = []
        read = 0
        for batch, fed in fitting.items():
            # Other positions in every batch: what is at one place only must not decide.
            unfolding = Unfolding(layer.form, shape, max(SEEN_POSITIONS, math.ceil(share)), seed=batch)
            rows = unfolding.rows(front.value(cut.x, batch), fed.counted, fed.samples)
            rows = rows[np.isfinite(rows).all(axis=(1, 2))]
            read += fed.samples
            wanted = max(math.ceil(share * read) - sum(map(len, found)), 0)
            found.append(rows[np.sort(rng.choice(len(rows), min(wanted, len(rows)), replace=False))])
        rows = np.concatenate(found)
        return SeenInputs(layer.read(), rows, stop.centred) if len(rows) else None


def grams(
    graph: Graph, layers: Sequence[Layer], samples: Samples, target: Target, folder: Path
) -> Iterator[tuple[Layer, Array]]:
    """Every layer a walk can stop at with the second moment its candidates are calibrated with, in graph order.

    Args:
        graph: The network.
        layers: Its layers.
        samples: Those for fitting are used.
        target: Where parts of the network run.
        folder: An empty folder for activations.

    Raises:
        CannotCutError: if something would have to be carried along that is no array.
    """
    every = stops(graph, layers, samples.memory_limit)
    found = {key: stop for key, stop in every.items() if not stop.in_row_space}
    path = route(graph, {key: stop.operand for key, stop in found.items()})
    front, moments = Front(folder, target), InputMoments(found, path, len(samples.fit))
    fitting: dict[int, Fed] = {}
    for feeds, fits, count in samples.batches():
        if fits:
            fitting[len(fitting)] = Fed(count, samples.counted(feeds))
            front.put(feeds)
    for number, cut in enumerate(path.cuts):
        stop = found[cut.key]
        front.advance(graph, path.fronts[number])
        yield stop.layer, moments.at(number, front, fitting).shrunk(centred=stop.centred)
