"""As many samples as there is room for on disk: a walk carries the activations of all of them, a refit twice."""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

from onnx_lowrank.calibration.samples import Samples, suited
from onnx_lowrank.calibration.stops import stops
from onnx_lowrank.calibration.walk import Front, route
from onnx_lowrank.graph.layers import layers
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.signature import Feeds
from onnx_lowrank.target import Target

logger = logging.getLogger(__name__)
# Activations of a refit, in bytes; a fixed number, so that the same samples are taken whatever disk is free.
MOST_CARRIED = 16e9
NETWORKS = 2
Shapes = tuple[tuple[str, tuple[int, ...]], ...]


def usable(samples: Samples, model: Path, graph: Graph, target: Target, folder: Path) -> Samples:
    """The samples a model is calibrated with, in the batches it takes: `suited`, then `affordable`."""
    return affordable(suited(samples, model, target), graph, target, folder)


def affordable(samples: Samples, graph: Graph, target: Target, folder: Path) -> Samples:
    """The samples, or as many of them as keep the activations of a refit below `MOST_CARRIED`.

    All layers of the graph are stopped at, whichever are to be factorized: whoever asks gets the same answer.

    Args:
        samples: All there are.
        graph: The network, normalized.
        target: Where parts of the network run.
        folder: For the activations of one batch of every shape.

    Raises:
        CannotCutError: if something would have to be carried along that is no array.
    """
    with tempfile.TemporaryDirectory(prefix="widest-", dir=folder) as room:
        needed = NETWORKS * carried(samples, graph, target, Path(room))
    if needed <= MOST_CARRIED:
        return samples
    fewer = samples.thinned(MOST_CARRIED / needed)
    logger.warning("%s", fewer.notes[-1])
    return fewer


def carried(samples: Samples, graph: Graph, target: Target, folder: Path) -> float:
    """Bytes of activations of all samples, where a walk through the network holds most of them.

    One batch of every shape is walked through, and counts for all of its shape.

    Args:
        samples: All there are.
        graph: The network.
        target: Where parts of it run.
        folder: An empty folder.
    """
    found = stops(graph, layers(graph, check=False)[0], samples.memory_limit)
    path = route(graph, {key: stop.operand for key, stop in found.items()})
    front, count, first = Front(folder, target), Counter[Shapes](), dict[Shapes, int]()
    for feeds, _, rows in samples.batches():
        shapes = _shapes(feeds, samples.fit.whole)
        if shapes not in first:
            first[shapes] = rows
            front.put(feeds)
        count[shapes] += rows
    times = [count[shapes] / rows for shapes, rows in first.items()]
    widest, held = 0.0, dict[str, list[int]]()
    for names in path.fronts:
        front.advance(graph, names)
        now = front.sizes()
        widest, held = max(widest, _total(held | now, times)), now
    return widest


def _shapes(feeds: Feeds, whole: Collection[str]) -> Shapes:
    """What tells batches of one shape from others: the last batch of a shape may hold fewer samples."""
    return tuple((name, array.shape[name not in whole :]) for name, array in sorted(feeds.items()))


def _total(sizes: Mapping[str, list[int]], times: list[float]) -> float:
    return sum(size * often for batches in sizes.values() for size, often in zip(batches, times, strict=True))
