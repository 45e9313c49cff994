"""Least squares over the factors of any chain: never worse, planted chains found again, closed forms left alone."""

from __future__ import annotations

import math
import string

import numpy as np
import pytest
from chains import moment
from hypothesis import given, settings
from hypothesis import strategies as st
from output_error import output_error

from onnx_lowrank.chain import Chain, Stage
from onnx_lowrank.contraction import second_moment, unused
from onnx_lowrank.decomposition import Rank
from onnx_lowrank.layer import Array, LayerShape
from onnx_lowrank.multilinear import refine
from onnx_lowrank.passes.decompose import decompositions

METHODS = decompositions()
RNG = np.random.default_rng(7)


def shared_tap(shape: LayerShape, rank: Rank) -> Chain:
    """The height in two stages at once: no convolution does that, but the equation is linear in both."""
    (r,), (h, w) = rank, shape.kernel
    stages = (Stage(shape.groups, r, shape.in_, (h, 1)), Stage(shape.groups, shape.out, r, (h, w)))
    return Chain("shared tap", stages, "grchi,gsrhw->gschw")


CONV = LayerShape(1, 8, 6, (3, 3))
CASES = {
    "svd": (CONV, METHODS["svd"].chain(CONV, (3,))),
    "svd_input": (CONV, METHODS["svd_input"].chain(CONV, (3,))),
    "spatial_svd": (CONV, METHODS["spatial_svd"].chain(CONV, (4,))),
    "spatial_svd_reversed": (CONV, METHODS["spatial_svd_reversed"].chain(CONV, (4,))),
    "tucker2": (CONV, METHODS["tucker2"].chain(CONV, (3, 4))),
    "cp": (CONV, METHODS["cp"].chain(CONV, (4,))),
    "cp_spatial": (CONV, METHODS["cp_spatial"].chain(CONV, (4,))),
    "tensor_train": (CONV, METHODS["tensor_train"].chain(CONV, (3, 3, 3))),
    "grouped_svd": (CONV, METHODS["grouped_svd"].chain(CONV, (2, 2))),
    "block_term": (CONV, METHODS["block_term"].chain(CONV, (2, 2, 3))),
    "shared tap": (CONV, shared_tap(CONV, (3,))),
    "dense": (CONV, Chain.unfactored(CONV)),
    "grouped": (shape := LayerShape(3, 6, 4, (3, 2)), METHODS["spatial_svd"].chain(shape, (2,))),
    "grouped tucker2": (shape, METHODS["tucker2"].chain(shape, (2, 3))),
    "grouped cp_spatial": (shape, METHODS["cp_spatial"].chain(shape, (3,))),
    "grouped grouped_svd": (shape, METHODS["grouped_svd"].chain(shape, (2, 2))),
    "grouped block_term": (shape, METHODS["block_term"].chain(shape, (2, 2, 2))),
    "Conv1d": (shape := LayerShape(1, 7, 5, (4,)), METHODS["svd_input"].chain(shape, (2,))),
    "Conv3d": (shape := LayerShape(1, 5, 4, (2, 3, 2)), METHODS["spatial_svd_reversed"].chain(shape, (3,))),
    "Conv3d tucker2": (shape, METHODS["tucker2"].chain(shape, (2, 3))),
    "Gemm": (shape := LayerShape(1, 9, 12), METHODS["svd"].chain(shape, (4,))),
    "Gemm stack": (shape := LayerShape(3, 9, 7), METHODS["svd"].chain(shape, (2,))),
    "one output": (shape := LayerShape(1, 1, 6, (3, 3)), METHODS["spatial_svd"].chain(shape, (2,))),
    "one input": (shape := LayerShape(1, 8, 1, (3, 3)), METHODS["spatial_svd"].chain(shape, (2,))),
}
every_chain = pytest.mark.parametrize(("shape", "chain"), CASES.values(), ids=CASES.keys())


def random_factors(chain: Chain, rng: np.random.Generator) -> tuple[Array, ...]:
    return tuple(rng.standard_normal(stage.weight) for stage in chain.stages)


@every_chain
@settings(deadline=None, max_examples=3)
@given(seed=st.integers(0, 999), condition=st.sampled_from([1.0, 1e3, 1e8]), scale=st.sampled_from([1e-6, 1.0, 1e6]))
def test_never_worse(shape: LayerShape, chain: Chain, seed: int, condition: float, scale: float) -> None:
    rng = np.random.default_rng(seed)
    weight, gram = rng.standard_normal(shape.weight), moment(shape, condition, seed) * scale
    start = random_factors(chain, rng)
    copies = [factor.copy() for factor in start]
    better = refine(chain, start, weight, gram)
    assert [factor.shape for factor in better] == [stage.weight for stage in chain.stages]
    before = output_error(weight, chain.dense(start), gram)
    assert output_error(weight, chain.dense(better), gram) < before  # a random start can be improved
    for factor, copy in zip(start, copies, strict=True):
        np.testing.assert_array_equal(factor, copy)


@every_chain
def test_a_planted_chain_is_found_again(shape: LayerShape, chain: Chain) -> None:
    rng = np.random.default_rng(3)
    planted = random_factors(chain, rng)
    weight, gram = chain.dense(planted), moment(shape, 10.0)
    start = tuple(factor + 0.05 * rng.standard_normal(factor.shape) for factor in planted)
    found = refine(chain, start, weight, gram, sweeps=30, iterations=5)
    error = output_error(weight, chain.dense(found), gram)
    assert error < 2e-2 * output_error(weight, chain.dense(start), gram)
    assert error < 1e-3


@pytest.mark.parametrize("name", ["svd_input", "spatial_svd", "spatial_svd_reversed", "tucker2"])
def test_sweeps_improve_on_the_calibrated_start(name: str) -> None:
    shape, method = LayerShape(1, 24, 16, (3, 3)), METHODS[name]
    weight, gram = RNG.standard_normal(shape.weight), moment(shape, 1e3)
    rank = (6, 8) if name == "tucker2" else (8,)
    made, chain = method.factorize(weight, gram), method.chain(shape, rank)
    found = refine(chain, made.factors(rank), weight, gram)
    error = output_error(weight, chain.dense(found), gram)
    assert error < 0.99 * made.error(rank)
    again = refine(chain, found, weight, gram, sweeps=20)
    assert output_error(weight, chain.dense(again), gram) <= error


def test_what_has_a_closed_form_is_left_alone() -> None:
    shape, method = LayerShape(1, 12, 8, (3, 3)), METHODS["svd"]
    weight, gram = RNG.standard_normal(shape.weight), moment(shape, 1e3)
    start, chain = method.factorize(weight, gram).factors((4,)), method.chain(shape, (4,))
    found = refine(chain, start, weight, gram, sweeps=5, iterations=20)
    assert output_error(weight, chain.dense(found), gram) == pytest.approx(
        output_error(weight, chain.dense(start), gram), rel=1e-9
    )


def test_svd_from_a_poor_start_reaches_its_closed_form() -> None:
    shape, method = LayerShape(1, 12, 8, (3, 3)), METHODS["svd"]
    weight, gram = RNG.standard_normal(shape.weight), moment(shape, 1e2)
    best = method.factorize(weight, gram).error((4,))
    chain = method.chain(shape, (4,))
    found = refine(chain, method.factorize(weight).factors((4,)), weight, gram, sweeps=100, iterations=10)
    assert best <= output_error(weight, chain.dense(found), gram) * (1 + 1e-9)
    assert output_error(weight, chain.dense(found), gram) < 1.02 * best


@every_chain
def test_single_precision_agrees(shape: LayerShape, chain: Chain) -> None:
    rng = np.random.default_rng(4)
    weight, gram, start = rng.standard_normal(shape.weight), moment(shape, 1e3), random_factors(chain, rng)
    double, single = refine(chain, start, weight, gram), refine(chain, start, weight, gram.astype(np.float32))
    assert {factor.dtype for factor in double} == {np.dtype(np.float64)}
    assert {factor.dtype for factor in single} == {np.dtype(np.float32)}
    expected = output_error(weight, chain.dense(double), gram)
    assert output_error(weight, chain.dense(single), gram) == pytest.approx(expected, rel=1e-3, abs=1e-3)


@every_chain
@pytest.mark.parametrize("known", [0, 1, 3])
def test_singular_moments_do_not_blow_up(shape: LayerShape, chain: Chain, known: int) -> None:
    """As many samples as `known`; with none, nothing can be gained and nothing is touched."""
    rng = np.random.default_rng(5)
    samples = rng.standard_normal((shape.groups, known, shape.inputs))
    weight, gram, start = (
        rng.standard_normal(shape.weight),
        samples.swapaxes(1, 2) @ samples,
        random_factors(chain, rng),
    )
    found = refine(chain, start, weight, gram)
    assert all(np.isfinite(factor).all() for factor in found)
    if known:
        assert output_error(weight, chain.dense(found), gram) <= output_error(weight, chain.dense(start), gram)
        assert max(np.abs(factor).max() for factor in found) < 1e4
    else:
        for ours, theirs in zip(found, start, strict=True):
            assert ours is theirs


@pytest.mark.parametrize("where", ["gram", "weight", "factor"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_not_finite_comes_back_as_it_was(where: str, value: float) -> None:
    shape, chain = CASES["spatial_svd"]
    arrays = {"weight": RNG.standard_normal(shape.weight), "gram": moment(shape, 10.0)}
    first, last = random_factors(chain, RNG)
    arrays["factor"] = first
    arrays[where].flat[0] = value
    found = refine(chain, (first, last), arrays["weight"], arrays["gram"])
    assert found[0] is first
    assert found[1] is last


def test_groups_are_refined_each_by_itself() -> None:
    shape, chain = CASES["grouped"]
    rng = np.random.default_rng(6)
    weight, gram, start = rng.standard_normal(shape.weight), moment(shape, 1e2), random_factors(chain, rng)
    together = refine(chain, start, weight, gram)
    one = METHODS["spatial_svd"].chain(LayerShape(1, shape.out, shape.in_, shape.kernel), (2,))
    for i in range(shape.groups):
        part = slice(i, i + 1)
        alone = refine(one, [factor[part] for factor in start], weight[part], gram[part])
        for ours, theirs in zip(together, alone, strict=True):
            np.testing.assert_allclose(ours[part], theirs, rtol=1e-9)


def test_factors_shared_between_groups_are_left_alone() -> None:
    chain = Chain("tied", (Stage(1, 2, 4), Stage(2, 5, 2)), "zrc,gsr->gsc")
    start = random_factors(chain, RNG)
    found = refine(chain, start, RNG.standard_normal((2, 5, 4)), np.stack([np.eye(4)] * 2))
    assert found[0] is start[0]
    assert found[1] is start[1]


def test_a_group_of_its_own_inside_a_layer_without_groups() -> None:
    """Depthwise stages have as many groups as channels: their axis is no group of the layer."""
    chain = Chain(
        "depthwise inside", (Stage(1, 3, 5, (1,)), Stage(3, 1, 1, (4,)), Stage(1, 6, 3, (1,))), "arcx,rbdh,gsry->gsch"
    )
    rng = np.random.default_rng(8)
    planted = random_factors(chain, rng)
    weight, gram = chain.dense(planted), moment(LayerShape(1, 6, 5, (4,)), 10.0)
    start = tuple(factor + 0.1 * rng.standard_normal(factor.shape) for factor in planted)
    found = refine(chain, start, weight, gram, sweeps=100)
    assert output_error(weight, chain.dense(found), gram) < 1e-2


@pytest.mark.parametrize("inputs", ["hw", "c", "chw"])
@pytest.mark.parametrize("letter", ["q", "n", "p"])
def test_second_moments_are_einsums(inputs: str, letter: str) -> None:
    """Against one einsum of everything: a product over letters that are summed, tied, and those of G."""
    sizes, rng = dict(zip("npcqhws", (2, 3, 4, 5, 2, 3, 7), strict=True)), np.random.default_rng(2)
    terms = [(letters, rng.standard_normal([sizes[x] for x in letters])) for letters in ("npc", "nqphw", "snq")]
    moment, tied = rng.standard_normal([sizes[x] for x in inputs] * 2), set("nps") - {letter}
    there = {x: x if x in tied else x.upper() for x in sizes}
    again = ["".join(there[x] for x in letters) for letters, _ in terms]
    middle = inputs + inputs.upper()
    equation = ",".join([*(letters for letters, _ in terms), middle, *again]) + "->" + letter + there[letter]
    arrays = [array for _, array in terms]
    expected = np.einsum(equation, *arrays, moment, *arrays)
    np.testing.assert_allclose(
        second_moment(terms, letter, tied, inputs, moment, sizes), expected, rtol=1e-9, atol=1e-9
    )


def test_second_moments_of_terms_apart_are_multiplied() -> None:
    """CP's depthwise stage: the terms share nothing but their number."""
    rng = np.random.default_rng(4)
    b, a, root = rng.standard_normal((7, 5)), rng.standard_normal((6, 7)), rng.standard_normal((5, 5))
    gram, sizes = root @ root.T, dict(zip("rcshw", (7, 5, 6, 3, 2), strict=True))
    found = second_moment([("rc", b), ("sr", a)], "r", set("hws"), "c", gram, sizes)
    np.testing.assert_allclose(found, (b @ gram @ b.T) * (a.T @ a), rtol=1e-12)


def test_output_error() -> None:
    weight, gram = np.array([[[3.0, 4.0]]]), np.array([[[1.0, 0.0], [0.0, 0.25]]])
    assert output_error(weight, weight, gram) == 0
    assert output_error(weight, np.array([[[3.0, 0.0]]]), gram) == pytest.approx(2 / math.sqrt(13))
    assert output_error(weight, 0 * weight, gram) == 1
    assert output_error(weight, 0 * weight, 0 * gram) == 0


def test_letters_that_run_out() -> None:
    fresh = unused(string.ascii_letters[1:])
    assert next(fresh) == "a"
    with pytest.raises(ValueError, match=r"^got an einsum with more axes than there are letters; expected at most 52$"):
        next(fresh)
