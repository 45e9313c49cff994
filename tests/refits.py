"""Samples and chains to refit small networks with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from builders import run_model, worst_error
from formats import EVERY as METHODS
from numpy.typing import NDArray
from onnx import ModelProto

from onnx_lowrank.calibration.samples import Samples, divided
from onnx_lowrank.data import Dataset, Part
from onnx_lowrank.decomposition import Decomposition, Rank
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.layer import Layer, LayerShape
from onnx_lowrank.refit import arrays, refit
from onnx_lowrank.regression import Chosen, Refitted
from onnx_lowrank.rewrite import Replacement, splice
from onnx_lowrank.target import Target

TARGET = Target(threads=1)
SVD = METHODS["svd"]


def samples(count: int, name: str, shape: tuple[int, ...], seed: int = 0) -> Samples:
    values = np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32)
    return divided(Dataset((Part({name: values}),), frozenset(), None), 0)[0]


def halved(layers: Iterable[Layer], method: Decomposition = SVD) -> list[Chosen]:
    """Those of the layers that the method fits, at half of the rank that is exact."""
    return [Chosen(layer, method, half) for layer in layers if (half := half_of(layer.shape, method)) is not None]


def half_of(shape: LayerShape, method: Decomposition) -> Rank | None:
    """Half of the rank that is exact; None where the method does not fit, or no rank is exact."""
    exact = method.exact_rank(shape) if method.refusal(shape) is None else None
    return None if exact is None else tuple(max(1, r // 2) for r in exact)


def realised(proto: ModelProto, chosen: list[Chosen], found: Mapping[str, Refitted]) -> ModelProto:
    graph, fits = Graph(proto), arrays(found)
    splice(
        graph, [Replacement(one.layer, one.chain, fits[one.layer.key], {}) for one in chosen if one.layer.key in fits]
    )
    return graph.to_proto()


def refitted(
    proto: ModelProto, chosen: list[Chosen], given: Samples, folder: Path, *, regress: bool = True
) -> tuple[ModelProto, dict[str, Refitted]]:
    done: list[int] = []
    graph = Graph(proto)
    found = refit(graph, chosen, given, TARGET, folder, lambda i, n: done.append(n - i), regress=regress)
    assert done == sorted(done, reverse=True)
    assert not list(folder.iterdir())
    return realised(proto, chosen, found), found


def distance(proto: ModelProto, other: ModelProto, feeds: Mapping[str, NDArray[np.generic]]) -> float:
    return worst_error(run_model(proto, feeds), run_model(other, feeds))
