"""Refit: never worse where it is judged, exact where nothing is lost, and whole networks come out nearer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders import model, run_model, value, worst_error
from formats import EVERY as METHODS
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper
from roads import node, shared
from walks import branching, embedding, residual, weight

from onnx_lowrank.calibration.layer_data import Block, LayerData
from onnx_lowrank.calibration.samples import Samples, divided
from onnx_lowrank.data import Dataset, Part
from onnx_lowrank.decomposition import Decomposition
from onnx_lowrank.graph.layers import layers
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.layer import Array, Form, Layer, LayerShape
from onnx_lowrank.refit import arrays, refit
from onnx_lowrank.regression import Chosen, Refitted, fit_chain
from onnx_lowrank.rewrite import Replacement, splice
from onnx_lowrank.target import Target

TARGET = Target(threads=1)
SVD = METHODS["svd"]
INPUTS = {"residual": ("image", (3, 8, 8)), "branching": ("x", (6,)), "shared": ("x", (96,))}


def samples(count: int, name: str, shape: tuple[int, ...], seed: int = 0) -> Samples:
    values = np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32)
    return divided(Dataset((Part({name: values}),), frozenset(), None), 0)[0]


def halved(layer: Layer, method: Decomposition = SVD) -> Chosen:
    """The layer at half of the rank that is exact; kept where the method does not fit it."""
    exact = method.exact_rank(layer.shape) if method.refusal(layer.shape) is None else None
    return Chosen(layer) if exact is None else Chosen(layer, method, tuple(max(1, r // 2) for r in exact))


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


# --- one layer ---


def a_layer(shape: LayerShape, seed: int) -> Layer:
    values = np.random.default_rng(seed).standard_normal(shape.weight)
    return Layer("k", shape, Form("MatMul", TensorProto.FLOAT, 17), ("k",), (), "w", lambda: values)


def rows_of(
    layer: Layer,
    seed: int,
    *,
    count: int,
    relu: bool,
    rank: int | None = None,
    upstream: float = 0.3,
    offset: float = 1.0,
) -> LayerData:
    """Inputs of a network that has lost something, and what the original made of the originals."""
    rng = np.random.default_rng(seed)
    groups, out = layer.shape.groups, layer.shape.out
    n = layer.shape.inputs
    mix = rng.standard_normal((groups, rank or n, n))
    matrix = layer.read().reshape(groups, out, n)

    def block(size: int) -> Block:
        c = np.einsum("gkn,rgk->rgn", mix, rng.standard_normal((size, groups, rank or n))) + offset
        y = np.einsum("gsn,rgn->rgs", matrix, c) + 0.5
        lossy = c + upstream * rng.standard_normal(c.shape) * np.abs(c)
        return Block(lambda: lossy, y, None)

    return LayerData([block(count), block(count)], [block(40)], relu)


SHAPES = st.sampled_from(
    [LayerShape(1, 6, 8), LayerShape(2, 4, 5), LayerShape(1, 5, 2, (3, 3)), LayerShape(2, 4, 3, (3,))]
)


@settings(deadline=None, max_examples=25)
@given(
    SHAPES,
    st.sampled_from(sorted(METHODS)),
    st.integers(0, 50),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 3, 60]),
)
def test_the_judged_error_never_rises(
    shape: LayerShape, method: str, seed: int, relu: bool, biased: bool, count: int
) -> None:
    layer = a_layer(shape, seed)
    one, data = halved(layer, METHODS[method]), rows_of(layer, seed, count=count, relu=relu)
    inside = np.full(shape.groups * shape.out, 0.5) if biased else None
    plain, found = (fit_chain(one, data, inside, regress=regress) for regress in (False, True))
    assert found.error <= found.error_before
    assert plain.error == plain.error_before == found.error_before
    assert np.isfinite(found.error)
    if found.fit is None:
        assert one.method is None
        return
    assert [f.shape for f in found.fit.factors] == [stage.weight for stage in one.chain.stages]
    assert all(np.isfinite(f).all() for f in found.fit.factors)
    matrix = one.chain.dense(found.fit.factors).reshape(shape.groups, shape.out, -1)
    assert (found.fit.bias is None) == (not biased)
    bias = None
    if inside is not None and found.fit.bias is not None:
        bias = (inside + found.fit.bias).reshape(shape.groups, shape.out)
    assert data.error(matrix, bias) == pytest.approx(found.error, rel=1e-6)  # what is handed back is what was judged


SINGULAR = {
    "fewer rows than inputs": {"count": 2},
    "inputs in a plane": {"count": 50, "rank": 2},
    "inputs that are all alike": {"count": 50, "rank": 1, "upstream": 0.0, "offset": 0.0},
}


@pytest.mark.parametrize("kind", SINGULAR)
@pytest.mark.parametrize("method", sorted(METHODS))
def test_singular_moments_do_no_harm(kind: str, method: str) -> None:
    layer = a_layer(LayerShape(1, 6, 4, (3, 3)), 1)
    one = halved(layer, METHODS[method])
    for relu in (False, True):
        found = fit_chain(one, rows_of(layer, 2, relu=relu, **SINGULAR[kind]), np.full(6, 0.5))  # pyright: ignore[reportArgumentType]
        assert found.fit is not None or one.method is None
        assert np.isfinite(found.error)
        assert found.error <= found.error_before
        if found.fit is not None:
            largest = max(float(np.abs(f).max()) for f in found.fit.factors)
            assert largest < 100 * float(np.abs(layer.read()).max())


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_inputs(value: float) -> None:
    layer = a_layer(LayerShape(1, 5, 7), 0)
    c = np.full((30, 1, 7), value)
    y = np.einsum("gsn,rgn->rgs", layer.read(), c) + 0.5
    data = LayerData([Block(lambda: c, y, None)], [Block(lambda: c, y, None)], relu=False)
    found = fit_chain(Chosen(layer, SVD, (2,)), data, np.full(5, 0.5))
    assert found.error < 1e-6  # the bias alone gives it


def few_images(rng: np.random.Generator, count: int, weight: Array) -> list[Block]:
    """Rows of `count` images, 40 each, that vary along six directions of their own."""
    scales = np.geomspace(1, 0.05, weight.shape[1])
    blocks: list[Block] = []
    for _ in range(count):
        c = (rng.standard_normal((40, 6)) @ rng.standard_normal((6, len(scales))) * scales)[:, None, :]
        blocks.append(Block(lambda c=c: c, c @ weight.T + 0.5, None))
    return blocks


@pytest.mark.parametrize("count", [2, 4, 16])
def test_few_and_alike_samples_do_no_harm(count: int) -> None:
    errors: list[tuple[float, float]] = []
    for seed in range(6):
        layer = a_layer(LayerShape(1, 32, 32), seed)
        weight, rng = layer.read().reshape(32, 32), np.random.default_rng(seed)
        data = LayerData(few_images(rng, count, weight), few_images(rng, max(count // 4, 1), weight), relu=False)
        fresh = replace(data, judge=few_images(rng, 60, weight))
        one, bias = Chosen(layer, SVD, (12,)), np.full((1, 32), 0.5)
        free = one.chain.dense(one.factors(weight)).reshape(1, 32, 32)
        found = fit_chain(one, data, bias[0])
        assert found.fit is not None
        assert found.fit.bias is not None
        assert found.error <= data.error(free, bias) * (1 + 1e-9)
        matrix = one.chain.dense(found.fit.factors).reshape(1, 32, 32)
        errors.append((fresh.error(matrix, bias + found.fit.bias), fresh.error(free, bias)))
    found_error, free_error = np.mean(errors, axis=0)
    assert found_error < 1.1 * free_error  # on samples that were neither fitted nor judged by


@pytest.mark.parametrize("name", sorted(name for name, method in METHODS.items() if method.by_rank))
def test_what_is_known_of_a_weight_changes_nothing(name: str) -> None:
    method = METHODS[name]
    shapes = (LayerShape(1, 12, 8, (3, 3)), LayerShape(1, 24, 36))
    layer = a_layer(next(shape for shape in shapes if method.refusal(shape) is None), 3)
    weight, n = layer.read(), layer.shape.inputs
    rank = method.ranks(layer.shape, 1)[-1]
    c = np.random.default_rng(0).standard_normal((200, n)) * np.geomspace(1, 0.1, n)
    gram, other = (c.T @ c / 200)[None], np.eye(n)[None]
    known = method.factorize(weight, other)
    for each in method.ranks(layer.shape, 1):
        known.error(each)
    plain = Chosen(layer, method, rank).started(weight, gram)
    helped = Chosen(layer, method, rank, {(layer.key, method.name): known}).started(weight, gram)
    for one, two in ((plain[0](), helped[0]()), (plain[1], helped[1])):
        assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


def test_no_rows_at_all_leave_a_data_free_chain() -> None:
    layer = a_layer(LayerShape(1, 5, 7), 0)
    nothing = [Block(lambda: np.zeros((0, 1, 7)), np.zeros((0, 1, 5)), None)]
    found = fit_chain(Chosen(layer, SVD, (2,)), LayerData(nothing, nothing, relu=False), np.full(5, 0.5))
    assert found.fit is not None
    assert found.fit.bias is None or not found.fit.bias.any()
    for got, wanted in zip(found.fit.factors, SVD.factorize(layer.read()).factors((2,)), strict=True):
        np.testing.assert_allclose(got, wanted)
    assert fit_chain(Chosen(layer), LayerData([], [], relu=False), np.full(5, 0.5)).fit is None


def test_relaxing_lowers_the_error_after_the_relu_on_its_own_data() -> None:
    for seed in range(4):
        layer = a_layer(LayerShape(1, 12, 10), seed)
        data = rows_of(layer, seed, count=400, relu=True, offset=-0.5)
        own = replace(data, judge=data.fit)
        one = Chosen(layer, SVD, (3,))
        linear = fit_chain(one, replace(own, relu=False), np.full(12, 0.5))
        relaxed = fit_chain(one, own, np.full(12, 0.5))
        assert linear.fit is not None
        assert linear.fit.bias is not None
        matrix = one.chain.dense(linear.fit.factors).reshape(1, 12, 10)
        assert relaxed.error < own.error(matrix, (linear.fit.bias + 0.5)[None])
        assert relaxed.what.startswith("ReLU")


def test_the_other_branch_of_a_sum_is_repaired() -> None:
    layer = a_layer(LayerShape(1, 8, 8), 0)
    rng = np.random.default_rng(1)

    def block(size: int) -> Block:
        c = rng.standard_normal((size, 1, 8))
        y = np.einsum("gsn,rgn->rgs", layer.read(), c)
        return Block(lambda: c, y + 2 * c, c)  # the branch gave twice the input, and gives it once now

    data = LayerData([block(200)], [block(50)], relu=False)
    found = fit_chain(Chosen(layer), data, None)
    assert found.error_before > 0.1
    assert found.error < 1e-3


# --- whole networks ---


@pytest.mark.parametrize("name", ["residual", "branching"])
def test_full_rank_leaves_the_outputs_alone(name: str, tmp_path: Path) -> None:
    proto = {"residual": residual, "branching": branching}[name]()
    given = samples(48, *INPUTS[name])
    chosen = [Chosen(layer, SVD, exact) for layer in layers(Graph(proto))[0] if (exact := SVD.exact_rank(layer.shape))]
    made, found = refitted(proto, chosen, given, tmp_path)
    assert found
    feeds = {INPUTS[name][0]: np.random.default_rng(9).standard_normal((4, *INPUTS[name][1])).astype(np.float32)}
    assert distance(proto, made, feeds) < 1e-4


@pytest.mark.parametrize("method", ["svd", "tucker2", "spatial"])
def test_refit_repairs_what_was_lost_upstream(method: str, tmp_path: Path) -> None:
    proto = residual()
    found_layers = layers(Graph(proto))[0]
    if method not in METHODS:
        method = next(name for name in sorted(METHODS) if name.startswith(method))
    chosen = [halved(layer, METHODS[method]) for layer in found_layers]
    given = samples(96, *INPUTS["residual"])
    with_it, found = refitted(proto, chosen, given, tmp_path)
    without, _ = refitted(proto, chosen, given, tmp_path, regress=False)
    feeds = {"image": np.random.default_rng(9).standard_normal((64, 3, 8, 8)).astype(np.float32)}
    assert distance(proto, with_it, feeds) <= distance(proto, without, feeds)
    assert all(one.error <= one.error_before for one in found.values())


def test_layers_that_are_kept_are_refitted_behind_the_first_chain_only(tmp_path: Path) -> None:
    proto = residual()
    chosen = [halved(layer) if layer.key == "one/b" else Chosen(layer) for layer in layers(Graph(proto))[0]]
    made, found = refitted(proto, chosen, samples(64, *INPUTS["residual"]), tmp_path)
    assert "one/b" in found
    assert not {"stem", "one/a"} & found.keys()
    assert found.keys() - {"one/b"} <= {"two/beside", "two/a", "head"}
    only, alone = refitted(proto, chosen, samples(64, *INPUTS["residual"]), tmp_path, regress=False)
    assert set(alone) == {"one/b"}
    feeds = {"image": np.random.default_rng(9).standard_normal((64, 3, 8, 8)).astype(np.float32)}
    assert distance(proto, made, feeds) <= distance(proto, only, feeds)


@pytest.mark.parametrize("wide", ["branch", "layer"])
def test_a_branch_that_is_broadcast_in_front_of_a_relu(wide: str, tmp_path: Path) -> None:
    weights = {"w": weight(16, 8, 1, 1), "v": weight(16, 8, 1, 1, seed=1, scale=30.0)}
    nodes = [
        node("GlobalAveragePool", "image", "pooled"),
        node("Conv", "pooled v" if wide == "layer" else "image v", "other", "other"),
        node("Conv", "image w" if wide == "layer" else "pooled w", "y", "factored"),
        node("Add", "y other", "sum"),
        node("Relu", "sum", "answer"),
    ]
    proto = model(nodes, [value("image", ["N", 8, 8, 8])], [value("answer", ["N", 16, 8, 8])], weights)
    chosen = [
        Chosen(layer, SVD, (3,)) if layer.key == "factored" else Chosen(layer) for layer in layers(Graph(proto))[0]
    ]
    feeds = {"image": np.random.default_rng(9).standard_normal((64, 8, 8, 8)).astype(np.float32)}
    errors: list[float] = []
    for regress in (True, False):
        made, _ = refitted(proto, chosen, samples(384, "image", (8, 8, 8)), tmp_path, regress=regress)
        truth, got = (run_model(each, feeds)[0] for each in (proto, made))
        errors.append(float(np.linalg.norm(got - truth)))
    assert errors[0] <= errors[1] * 1.01


def test_nothing_to_refit(tmp_path: Path) -> None:
    chosen = [Chosen(layer) for layer in layers(Graph(residual()))[0]]
    assert refit(Graph(residual()), chosen, samples(8, *INPUTS["residual"]), TARGET, tmp_path, lambda *_: None) == {}


def test_batch_size_and_order_of_samples_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proto = residual()
    chosen = [halved(layer) for layer in layers(Graph(proto))[0]]
    images = np.random.default_rng(0).standard_normal((40, 3, 8, 8)).astype(np.float32)
    made: list[ModelProto] = []
    for size, order in ((1, slice(None)), (5, slice(None)), (32, slice(None)), (32, slice(None, None, -1))):
        monkeypatch.setattr("onnx_lowrank.calibration.samples.LARGEST_BATCH", size)
        given = divided(Dataset((Part({"image": images[order]}),), frozenset(), None), 0)[0]
        made.append(refitted(proto, chosen, replace(given, largest_batch=size), tmp_path)[0])
    feeds = {"image": np.random.default_rng(9).standard_normal((8, 3, 8, 8)).astype(np.float32)}
    for other in made[1:]:
        assert distance(made[0], other, feeds) < 1e-5
    assert made[2].SerializeToString() == made[3].SerializeToString()


def test_shared_weights_and_layers_in_bodies_stay_data_free(tmp_path: Path) -> None:
    found = refitted(shared(), [halved(one) for one in layers(Graph(shared()))[0]], samples(40, "x", (96,)), tmp_path)[
        1
    ]
    assert set(found) == {"other"}


def test_a_constant_input_and_whole_numbers_fed(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 20, (40, 7))
    given = divided(Dataset((Part({"ids": ids}), Part({"ids": ids[:16, :3]})), frozenset(), None), 0)[0]
    chosen = [halved(layer) for layer in layers(Graph(embedding()))[0]]
    _, found = refitted(embedding(), chosen, given, tmp_path)
    assert {"words", "last"} == set(found)


def named_alike() -> ModelProto:
    """Two layers of one name, and an unnamed If whose bodies hold layers, behind nodes that a pass would remove."""
    weights = {name: weight(6, 6, seed=seed) for seed, name in enumerate(("u", "v", "t"))}
    weights["yes"] = np.array(True)  # pyright: ignore[reportArgumentType]
    branches = [
        helper.make_graph([node("MatMul", "b t", f"r{n}", "inside")], f"g{n}", [], [value(f"r{n}", ["N", 6])])
        for n in range(2)
    ]
    nodes = [
        node("Identity", "x", "x1"),
        node("MatMul", "x1 u", "a", "same"),
        node("MatMul", "a v", "b", "same"),
        node("ReduceSum", "b", "total", keepdims=0),
        node("Less", "total total", "choice"),
        node("If", "choice", "y", then_branch=branches[0], else_branch=branches[1]),
    ]
    return model(nodes, [value("x", ["N", 6])], [value("y", ["N", 6])], weights)


def test_names_used_twice_and_bodies_of_nodes_without_one(tmp_path: Path) -> None:
    graph = Graph(named_alike())
    graph.main.rename_input("x1", "x")
    graph.main.remove(graph.main.nodes[0])  # places of nodes are others now than when the file was read
    chosen = [halved(layer) for layer in layers(graph)[0]]
    found = refit(graph, chosen, samples(40, "x", (6,)), TARGET, tmp_path, lambda *_: None)
    assert set(found) == {"same@a", "same@b"}


def test_shapes_that_depend_on_values(tmp_path: Path) -> None:
    weights = {"u": weight(6, 6), "v": weight(6, 6, seed=1), "zero": np.array(0, np.float32)}
    nodes = [
        node("MatMul", "x u", "a", "first"),
        node("ReduceSum", "a ax", "s", keepdims=0),
        node("Greater", "s zero", "positive"),
        node("Compress", "a positive", "some", axis=0),
        node("MatMul", "some v", "y", "second"),
    ]
    weights["ax"] = np.array([1])  # pyright: ignore[reportArgumentType]
    proto = model(nodes, [value("x", ["N", 6])], [value("y", ["M", 6])], weights)
    chosen = [Chosen(layer, SVD, (1,)) for layer in layers(Graph(proto))[0]]
    _, found = refitted(proto, chosen, samples(40, "x", (6,)), tmp_path)
    assert set(found) == {"first", "second"}
