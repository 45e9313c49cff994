"""Decomposed weights are kept: beyond the memory limit on disk, and only while the disk has room."""

from __future__ import annotations

import pickle
import resource
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from builders import product_model

from onnx_lowrank.decomposition import Decomposition, Factorization, Rank
from onnx_lowrank.graph.layers import layers
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.layer import Array, Layer, LayerShape
from onnx_lowrank.passes.decompose import decompositions
from onnx_lowrank.passes.decompose.svd import Svd
from onnx_lowrank.plan import Choice, Plan
from onnx_lowrank.search.bench import Bench
from onnx_lowrank.search.factorizations import FactorizationCache, array_bytes
from onnx_lowrank.search.racer import Racer
from onnx_lowrank.target import Target

SVD = decompositions()["svd"]
SIZES = ((4, 6), (5, 7), (6, 8))


def some_layers() -> list[Layer]:
    made: list[Layer] = []
    for number, size in enumerate(SIZES):
        proto = product_model("MatMul", [3, size[0]], size)
        proto.graph.node[0].name = f"product{number}"
        made.extend(layers(Graph(proto))[0])
    return made


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_what_was_made_comes_back(tmp_path: Path, limit: int) -> None:
    cache, found = FactorizationCache(limit, tmp_path), some_layers()
    fresh = [cache.make(layer, SVD).factors((2,)) for layer in found]
    assert len(list(tmp_path.iterdir())) == (len(found) - 1 if limit == 0 else 0)
    assert list(cache) == [(layer.key, "svd") for layer in (found[-1:] + found[:-1] if limit == 0 else found)]
    assert len(cache) == len(found)
    for layer, factors in zip(found, fresh, strict=True):
        kept = cache.make(layer, SVD, weight=np.zeros(layer.shape.weight)).factors((2,))
        assert all(np.array_equal(a, b) for a, b in zip(factors, kept, strict=True))
    assert cache.get((found[0].key, "no method")) is None


@pytest.mark.parametrize("method", decompositions().values(), ids=lambda method: method.name)
def test_what_a_factorization_holds_is_counted(method: Decomposition) -> None:
    shape = LayerShape(1, 16, 12, (3, 3)) if method.refusal(LayerShape(1, 16, 12)) else LayerShape(1, 16, 12)
    weight = np.random.default_rng(0).standard_normal(shape.weight)
    gram = np.eye(shape.inputs)[None]
    made = method.factorize(weight, gram)
    pickled = len(pickle.dumps(made))
    assert 0.5 * pickled <= array_bytes(made) <= 2 * pickled + weight.nbytes


def test_shared_arrays_count_once() -> None:
    array = np.zeros(100)
    assert array_bytes({"a": [array, array[:50]], "b": (array.reshape(10, 10), 3, "text")}) == array.nbytes


def test_on_a_full_disk_they_are_forgotten(tmp_path: Path) -> None:
    cache, found = FactorizationCache(0, tmp_path), some_layers()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        cache.make(found[0], SVD)
        cache.make(found[1], SVD)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(cache) == [(found[1].key, "svd")]
    assert not list(tmp_path.iterdir())


@dataclass(frozen=True)
class WithRule(Svd):
    """Its factorizations hold what cannot be pickled."""

    def factorize(self, weight: Array, gram: Array | None = None, *, most: Rank | None = None) -> Factorization:
        made = super().factorize(weight, gram, most=most)
        vars(made)["rule"] = lambda rank: rank
        return made


def test_what_cannot_be_pickled_stays_in_memory(tmp_path: Path) -> None:
    cache = FactorizationCache(0, tmp_path)
    made = [cache.make(layer, WithRule()) for layer in some_layers()]
    assert [cache[key] for key in [*cache][1:]] == made[:-1]
    assert len(cache) == len(made)
    assert not list(tmp_path.iterdir())


def test_half_of_the_free_disk_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, found = FactorizationCache(0, tmp_path), some_layers()
    cache._reserve = 1 << 62
    cache.make(found[0], SVD)
    cache.make(found[1], SVD)
    assert list(cache) == [(found[1].key, "svd")]
    assert not list(tmp_path.iterdir())


def test_scopes_that_surveyed_layers_hold_never_see_new_weights(tmp_path: Path) -> None:
    graph = Graph(product_model("MatMul", [3, 8], (8, 6)))
    scope, before = graph.main, set(graph.main.initializers)
    racer = Racer(Target(threads=1), [], tmp_path)
    cache = FactorizationCache(1 << 20, tmp_path)
    bench = Bench(tmp_path / "unused.onnx", graph, decompositions(), cache, racer, tmp_path)
    path, record = bench.realise(Plan("0" * 64, (Choice("product", "product", "svd", (2,)),)))
    assert record.modified
    assert path.exists()
    assert set(scope.initializers) == set(graph.main.initializers) == before
