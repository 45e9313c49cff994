"""Which Kronecker products are worth a look: the weight chooses among all shapes of A."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from builders import conv_model
from onnx import numpy_helper

from onnx_lowrank.candidates import Candidate, Grid
from onnx_lowrank.goals import KeepMacs
from onnx_lowrank.graph.check import inferred_shapes
from onnx_lowrank.graph.layers import layers, shapes_as_trace
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.layer import Array, Layer, LayerShape, Shape
from onnx_lowrank.passes.decompose.kronecker import Kronecker, VanLoan
from onnx_lowrank.search.factorizations import FactorizationCache
from onnx_lowrank.search.matched import MatchedGrid, best_within
from onnx_lowrank.search.table import row_of

METHOD = Kronecker()
SHAPE = LayerShape(1, 24, 16, (3, 3))


def planted(mine: Shape, terms: int) -> Array:
    """Random terms with one shape of A, and 5 % noise."""
    rng = np.random.default_rng(4)
    chain = METHOD.chain(SHAPE, (*mine, terms))
    dense = chain.dense([rng.standard_normal(stage.weight) for stage in chain.stages])
    return dense + 0.05 * float(np.std(dense)) * rng.standard_normal(dense.shape)


WEIGHTS = {
    "Gaussian": np.random.default_rng(3).standard_normal(SHAPE.weight),
    "many small blocks": planted((8, 4, 1, 3), 4),
    "nearly an svd": planted((12, 1, 3, 3), 6),
    "nearly a spatial svd": planted((24, 2, 3, 1), 5),
}
every_weight = pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS.keys())


def layer_of(weight: Array, strides: Shape = (1, 1)) -> Layer:
    proto = conv_model((1, 16, 9, 9), weight.shape[1:], strides=strides)
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight[0].astype(np.float32), "w"))
    graph = Graph(proto)
    (layer,), _ = layers(graph, shapes_as_trace(graph, inferred_shapes(graph)))
    return layer


def options_of(layer: Layer, grid: Grid, folder: Path) -> tuple[Candidate, ...]:
    row = row_of(layer, [METHOD], grid, FactorizationCache(1 << 30, folder))
    assert not row.refusals
    return row.options


def least_error(layer: Layer, budget: float, cost: Literal["macs", "params"]) -> float:
    """Of every shape of A there is, each with the most terms that the budget buys and no more work than the layer."""
    made, found = VanLoan(layer.read().astype(np.float64)), list[float]()
    for s1 in (1, 2, 3, 4, 6, 8, 12, 24):
        for c1 in (1, 2, 4, 8, 16):
            for kernel in ((1, 1), (1, 3), (3, 1), (3, 3)):
                if s1 in {1, 24} and c1 in {1, 16}:
                    continue
                one, most = METHOD.chain(SHAPE, (s1, c1, *kernel, 1)), min(s1 * c1 * math.prod(kernel), SHAPE.params)
                most = min(most, SHAPE.params // most)
                size, dense = (one.macs(layer), layer.macs) if cost == "macs" else (one.params, SHAPE.params)
                work = sum(stage.copies * stage.params for stage in one.stages)
                terms = min(most, int(budget * dense / size), SHAPE.params // work)
                found += [made.error((s1, c1, *kernel, terms))] if terms else []
    return min(found)


@every_weight
@pytest.mark.parametrize("cost", ["macs", "params"])
@pytest.mark.parametrize("budget", [0.15, 0.25, 0.5])
def test_the_best_of_all_shapes_is_a_candidate(
    weight: Array, cost: Literal["macs", "params"], budget: float, tmp_path: Path
) -> None:
    layer = layer_of(weight)
    keep, *options = options_of(layer, Grid.of_size(SHAPE, 8, cost), tmp_path)
    assert min(o.error for o in options if o.cost(cost) <= budget * keep.cost(cost)) <= 1.03 * least_error(
        layer, budget, cost
    )


@every_weight
def test_budgets_count_strides(weight: Array, tmp_path: Path) -> None:
    layer = layer_of(weight, strides=(2, 2))
    keep, *options = options_of(layer, Grid.of_size(SHAPE, 8), tmp_path)
    assert min(o.error for o in options if o.macs <= 0.5 * keep.macs) <= 1.05 * least_error(layer, 0.5, "macs")


@every_weight
def test_formats_are_compared_at_their_best_shape(weight: Array, tmp_path: Path) -> None:
    layer, goal = layer_of(weight), KeepMacs(0.5)
    keep, *options = options_of(layer, MatchedGrid.near([goal], SHAPE, 8), tmp_path)
    best = best_within(options, keep, goal)
    assert best is not None
    assert best.error == pytest.approx(least_error(layer, 0.5, "macs"))


def test_few_are_fitted_and_fewer_timed(tmp_path: Path) -> None:
    layer = layer_of(WEIGHTS["Gaussian"])
    grid = Grid.of_machine(8)
    ranks = METHOD.ranks(SHAPE, 8)
    assert len(grid.fitted(layer, METHOD, ranks, layer.read())) <= 35 < len(ranks)
    assert len(options_of(layer, grid, tmp_path)) <= 1 + grid.per_method


WIDE = [
    (LayerShape(1, 256, 256, (3, 3)), 290),
    (LayerShape(1, 512, 512, (3, 3)), 200),
    (LayerShape(1, 4096, 25088), 30),
]


@pytest.mark.parametrize(("shape", "least"), WIDE, ids=str)
def test_of_wide_layers_as_many_shapes_are_looked_at_as_the_work_allows(shape: LayerShape, least: int) -> None:
    found = dict.fromkeys(rank[:-1] for rank in METHOD.ranks(shape, 16))
    assert len(found) >= least
    assert sum(min(math.prod(mine), shape.params // math.prod(mine)) for mine in found) * shape.params <= 8e10
