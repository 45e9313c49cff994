"""As many samples as there is room for on disk: a walk carries the activations of all of them, a refit twice."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path

from onnx_lowrank.calibration.samples import Samples
from onnx_lowrank.calibration.stops import stops
from onnx_lowrank.calibration.walk import Front, route
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.layer import Layer
from onnx_lowrank.target import Target

# Activations of a refit, in bytes; a fixed number, so that the same samples are taken whatever disk is free.
MOST_CARRIED = 16e9
NETWORKS = 2


def affordable(samples: Samples, graph: Graph, layers: Iterable[Layer], target: Target, folder: Path) -> Samples:
    """The samples, or as many of them as keep the activations of a refit below `MOST_CARRIED`.

    What one of the largest samples takes at the widest place of the network is measured, and taken for all.

    Args:
        samples: All there are.
        graph: The network, normalized.
        layers: Those a refit may stop at.
        target: Where parts of the network run.
        folder: For the activations of one sample.

    Raises:
        CannotCutError: if something would have to be carried along that is no array.
    """
    path = route(graph, {key: stop.operand for key, stop in stops(graph, layers).items()})
    largest = max(samples.fit.parts, key=lambda part: part.elements)
    (batch,) = islice(replace(samples.fit, parts=(largest,)).batches(), 1)
    with tempfile.TemporaryDirectory(prefix="widest-", dir=folder) as room:
        front = Front(Path(room), target)
        front.put(batch.feeds)
        for names in path.fronts:
            front.advance(graph, names)
    needed = NETWORKS * front.most_bytes / len(batch.rows)
    most = int(MOST_CARRIED / max(needed, 1))
    return samples if len(samples) <= most else samples.thinned(most)
