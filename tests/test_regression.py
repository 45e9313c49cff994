"""One layer fitted to what the original answers: never worse on samples it was not fitted on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from formats import EVERY as METHODS
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto
from refits import SVD, half_of, halved

from onnx_lowrank.calibration.layer_data import Block, LayerData
from onnx_lowrank.layer import Array, Form, Layer, LayerShape
from onnx_lowrank.regression import Chosen, fit_chain


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
    half = half_of(shape, METHODS[method])
    assume(half is not None)
    one, data = Chosen(layer, METHODS[method], half or ()), rows_of(layer, seed, count=count, relu=relu)
    inside = np.full(shape.groups * shape.out, 0.5) if biased else None
    plain, found = (fit_chain(one, data, inside, regress=regress) for regress in (False, True))
    assert found.error <= found.error_before
    assert plain.error == plain.error_before == found.error_before
    assert np.isfinite(found.error)
    assert [f.shape for f in found.fit.factors] == [stage.weight for stage in one.chain.stages]
    assert all(np.isfinite(f).all() for f in found.fit.factors)
    matrix = one.chain.dense(found.fit.factors).reshape(shape.groups, shape.out, -1)
    assert (found.fit.bias is None) == (not biased)
    bias = None
    if inside is not None and found.fit.bias is not None:
        bias = (inside + found.fit.bias).reshape(shape.groups, shape.out)
    assert data.error(matrix, bias) == pytest.approx(found.error, rel=1e-6)  # what is handed back is what was judged


SMALL = LayerShape(1, 6, 4, (3, 3))
SINGULAR = {
    "fewer rows than inputs": {"count": 2},
    "inputs in a plane": {"count": 50, "rank": 2},
    "inputs that are all alike": {"count": 50, "rank": 1, "upstream": 0.0, "offset": 0.0},
}


@pytest.mark.parametrize("kind", SINGULAR)
@pytest.mark.parametrize("method", sorted(name for name, method in METHODS.items() if half_of(SMALL, method)))
def test_singular_moments_do_no_harm(kind: str, method: str) -> None:
    layer = a_layer(SMALL, 1)
    (one,) = halved([layer], METHODS[method])
    for relu in (False, True):
        found = fit_chain(one, rows_of(layer, 2, relu=relu, **SINGULAR[kind]), np.full(6, 0.5))  # pyright: ignore[reportArgumentType]
        assert np.isfinite(found.error)
        assert found.error <= found.error_before
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
    assert found.fit.bias is None or not found.fit.bias.any()
    for got, wanted in zip(found.fit.factors, SVD.factorize(layer.read()).factors((2,)), strict=True):
        np.testing.assert_allclose(got, wanted)


def test_relaxing_lowers_the_error_after_the_relu_on_its_own_data() -> None:
    for seed in range(4):
        layer = a_layer(LayerShape(1, 12, 10), seed)
        data = rows_of(layer, seed, count=400, relu=True, offset=-0.5)
        own = replace(data, judge=data.fit)
        one = Chosen(layer, SVD, (3,))
        linear = fit_chain(one, replace(own, relu=False), np.full(12, 0.5))
        relaxed = fit_chain(one, own, np.full(12, 0.5))
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
    found = fit_chain(Chosen(layer, SVD, (8,)), data, None)
    assert found.error_before > 0.1
    assert found.error < 1e-3
