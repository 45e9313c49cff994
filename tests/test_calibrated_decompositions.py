"""The contract of every decomposition in the metric of the outputs: errors, closed forms, degenerate second moments."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from chains import moment
from formats import METHODS, comparable, some_ranks
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_lowrank.decomposition import Decomposition, Factorization, Rank
from onnx_lowrank.layer import Array, LayerShape, Shape
from onnx_lowrank.passes.decompose.two_stage import TwoStage

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
SHAPES = [
    LayerShape(1, 5, 4, (3, 3)),
    LayerShape(2, 4, 3, (3, 2)),
    LayerShape(1, 6, 3, (1, 5)),
    LayerShape(1, 4, 5, (3,)),
    LayerShape(1, 3, 4, (2, 3, 2)),
    LayerShape(1, 6, 9),
    LayerShape(3, 4, 5),
    LayerShape(1, 9, 4, (1, 1)),
]


def weight_of(shape: LayerShape, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal(shape.weight)


def output_energy(weight: Array, gram: Array) -> float:
    matrix = weight.reshape(*weight.shape[:2], -1)
    return float(np.einsum("gsi,gij,gsj->", matrix, gram, matrix))


def measured(method: Decomposition, made: Factorization, weight: Array, gram: Array, rank: Rank) -> float:
    """Relative output error of the arrays."""
    groups, out, in_, *kernel = weight.shape
    shape = LayerShape(groups, out, in_, tuple(kernel))
    dense = method.chain(shape, rank).dense(made.factors(rank))
    return math.sqrt(max(0.0, output_energy(weight - dense, gram) / output_energy(weight, gram)))


@every_method
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e12])
def test_the_error_told_is_that_of_the_factors(method: Decomposition, shape: LayerShape, condition: float) -> None:
    if method.refusal(shape) is not None:
        return
    limit = method.exact_rank(shape)
    assert limit is not None
    weight, gram = weight_of(shape), moment(shape, condition)
    made = method.factorize(weight, gram)
    ranks = some_ranks(method, shape)
    for rank in ranks:
        stages = method.chain(shape, rank).stages
        assert [factor.shape for factor in made.factors(rank)] == [stage.weight for stage in stages]
        assert made.error(rank) == pytest.approx(measured(method, made, weight, gram, rank), abs=1e-6)
    for less, more in itertools.permutations(ranks, 2):
        if comparable(method, less, more):
            assert made.error(more) <= made.error(less) + 1e-12
    dense = method.chain(shape, limit).dense(made.factors(limit))
    assert np.linalg.norm(weight - dense) < 1e-12 * np.linalg.norm(weight)
    assert made.error(limit) == 0.0


@given(st.integers(1, 3), st.integers(2, 8), st.integers(2, 8), st.sampled_from([(), (3,), (2, 2)]), st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_svd_is_the_best_chain_of_its_form(groups: int, out: int, in_: int, kernel: Shape, seed: int) -> None:
    """Eckart-Young in the metric G, against numpy's SVD of M G^(1/2)."""
    shape, method = LayerShape(groups, out, in_, kernel), METHODS["svd"]
    weight, gram = weight_of(shape, seed), moment(shape, 1e4, seed)
    made = method.factorize(weight, gram)
    sigma = np.linalg.svd(weight.reshape(groups, out, -1) @ np.linalg.cholesky(gram), compute_uv=False)
    total = np.square(sigma).sum()
    for rank in method.ranks(shape, 1):
        tail = np.square(sigma[:, rank[0] :]).sum()
        assert made.error(rank) == pytest.approx(math.sqrt(tail / total), abs=1e-7)
        assert made.spectral_error(rank) == pytest.approx(sigma[:, rank[0] :].max() / sigma.max(), abs=1e-6)


@every_method
@pytest.mark.parametrize("shape", [LayerShape(1, 24, 16, (3, 3)), LayerShape(2, 12, 12, (3,)), LayerShape(1, 40, 16)])
def test_correlated_inputs_are_approximated_better_than_the_weight_was(
    method: Decomposition, shape: LayerShape
) -> None:
    if method.refusal(shape) is not None:
        return
    weight, gram = weight_of(shape), moment(shape, 1e3)
    plain, made = method.factorize(weight), method.factorize(weight, gram)
    for rank in some_ranks(method, shape)[:-1] if method.on_request else method.ranks(shape, 4):
        assert made.error(rank) < measured(method, plain, weight, gram, rank)


def never_worse(method: Decomposition, shape: LayerShape, seed: int) -> None:
    """Few inputs that are seldom negative, as behind a ReLU: there the averaged moment misleads most."""
    rng = np.random.default_rng(seed)
    seen = np.maximum(rng.standard_normal((6, shape.inputs)) @ rng.standard_normal((shape.inputs, shape.inputs)), 0)
    gram = (seen.T @ seen / 6)[None]
    gram += 1e-3 * np.trace(gram[0]) / shape.inputs * np.eye(shape.inputs)
    weight = rng.standard_normal(shape.weight)
    plain, made = method.factorize(weight), method.factorize(weight, gram)
    for rank in method.ranks(shape, 1)[:4]:
        assert made.error(rank) <= measured(method, plain, weight, gram, rank) + 1e-6
        assert made.error(rank) == pytest.approx(measured(method, made, weight, gram, rank), abs=1e-5)


@pytest.mark.parametrize("seed", [268, 476, 992, 1268, 2842])
@every_method
def test_calibrated_factors_are_never_worse_than_those_of_the_weight(method: Decomposition, seed: int) -> None:
    never_worse(method, LayerShape(1, 16, 4, (3, 3)) if seed % 2 else LayerShape(1, 4, 16, (3, 3)), seed)


@settings(deadline=None, max_examples=20)
@given(
    st.sampled_from(["spatial_svd", "spatial_svd_reversed", "svd_input", "svd", "grouped_svd"]),
    st.integers(2, 8),
    st.integers(2, 8),
    st.sampled_from([(3, 3), (1, 3, 2)]),
    st.integers(0, 999),
)
def test_formats_that_try_the_rows_of_the_weight_are_never_worse(
    name: str, out: int, in_: int, kernel: Shape, seed: int
) -> None:
    never_worse(METHODS[name], LayerShape(1, out, in_, kernel), seed)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if isinstance(method, TwoStage)])
def test_the_last_stage_cannot_be_improved(name: str) -> None:
    shape, method = LayerShape(1, 6, 5, (3, 3)), METHODS[name]
    weight, gram = weight_of(shape), moment(shape, 1e2)
    made = method.factorize(weight, gram)
    chain, (first, last) = method.chain(shape, (2,)), made.factors((2,))
    basis = np.stack([chain.dense((first, unit.reshape(last.shape))).ravel() for unit in np.eye(last.size)])
    half = np.linalg.cholesky(gram[0])
    features = (basis.reshape(last.size, 6, -1) @ half).reshape(last.size, -1)
    best = np.linalg.lstsq(features.T, (weight.reshape(6, -1) @ half).ravel(), rcond=None)[0]
    np.testing.assert_allclose(last.ravel(), best, atol=1e-7)


@every_method
@pytest.mark.parametrize("gram", [0.0, np.nan, np.inf])
def test_a_moment_that_says_nothing_leaves_the_weight_to_approximate(method: Decomposition, gram: float) -> None:
    shape = LayerShape(1, 6, 5, (3, 3))
    weight, rank = weight_of(shape), method.ranks(shape, 1)[0]
    if method.refusal(shape) is not None:
        return
    plain = method.factorize(weight)
    made = method.factorize(weight, np.full((1, shape.inputs, shape.inputs), gram))
    assert made.error(rank) == plain.error(rank)
    for ours, theirs in zip(made.factors(rank), plain.factors(rank), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def dead_inputs(gram: Array) -> Array:
    gram = gram.copy()
    gram[:, : gram.shape[1] // 2] = gram[:, :, : gram.shape[1] // 2] = 0
    return gram


def dead_group(gram: Array) -> Array:
    gram = gram.copy()
    gram[0] = 0
    return gram


def one_sample(gram: Array) -> Array:
    sample = gram[:, :1]
    return sample * sample.swapaxes(1, 2)


@every_method
@pytest.mark.parametrize(("spoil", "scale"), [(dead_inputs, 1e-9), (dead_group, 1.0), (one_sample, 1e9)])
def test_singular_moments_do_not_blow_up(method: Decomposition, spoil: Callable[[Array], Array], scale: float) -> None:
    shape = LayerShape(2, 8, 6, (3, 3))
    weight, gram = weight_of(shape), spoil(moment(shape, 1e3)) * scale
    if method.refusal(shape) is not None:
        return
    made = method.factorize(weight, gram)
    for rank in some_ranks(method, shape)[:-1] if method.on_request else method.ranks(shape, 2):
        factors = made.factors(rank)
        assert all(np.isfinite(factor.astype(np.float16)).all() for factor in factors)
        dense = method.chain(shape, rank).dense(factors)
        assert np.linalg.norm(dense) < 1e3 * np.linalg.norm(weight)
        assert made.error(rank) == pytest.approx(measured(method, made, weight, gram, rank), abs=1e-5)


@every_method
def test_zero_weights_cost_nothing(method: Decomposition) -> None:
    shape = LayerShape(1, 6, 5, (3, 3))
    rank = method.ranks(shape, 1)[0]
    made = method.factorize(np.zeros(shape.weight), moment(shape, 10.0))
    assert made.error(rank) == 0.0
    assert not any(method.chain(shape, rank).dense(made.factors(rank)).ravel())


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if isinstance(method, TwoStage)])
def test_scale_is_shared_by_both_stages(name: str) -> None:
    shape = LayerShape(2, 8, 6, (3, 3))
    first, last = METHODS[name].factorize(1e4 * weight_of(shape), moment(shape, 1e3)).factors((3,))
    left = np.linalg.norm(first.reshape(2, 3, -1), axis=2)
    right = np.linalg.norm(last.swapaxes(1, 2).reshape(2, 3, -1), axis=2)
    np.testing.assert_allclose(left, right, rtol=1e-10)


@every_method
def test_groups_are_decomposed_each_by_itself(method: Decomposition) -> None:
    shape, one = LayerShape(2, 8, 6, (3, 3)), LayerShape(1, 8, 6, (3, 3))
    weight, gram = weight_of(shape), moment(shape, 1e2)
    rank = tuple(3 for _ in method.exact_rank(shape) or ())
    together = method.chain(shape, rank).dense(method.factorize(weight, gram).factors(rank))
    for group in range(2):
        alone = method.factorize(weight[group : group + 1], gram[group : group + 1])
        np.testing.assert_allclose(
            together[group : group + 1], method.chain(one, rank).dense(alone.factors(rank)), atol=1e-6
        )


@every_method
def test_the_arguments_are_left_as_they_were(method: Decomposition) -> None:
    shape = LayerShape(1, 6, 5, (3, 3))
    weight, gram = weight_of(shape).astype(np.float32), moment(shape, 1e2)
    copies = weight.copy(), gram.copy()
    method.factorize(weight, gram)
    np.testing.assert_array_equal(weight, copies[0])
    np.testing.assert_array_equal(gram, copies[1])
