"""Formats whose stages are shared over modes: planted weights, formulas, errors, second moments, plans, refusals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from builders import conv_model
from chains import moment
from output_error import output_error
from tensorly import tt_matrix_to_matrix
from tensorly.random import random_tr, random_tt_matrix

from onnx_lowrank.decomposition import Rank
from onnx_lowrank.graph.layers import layers
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.layer import Array, LayerShape, Shape
from onnx_lowrank.multilinear import refine
from onnx_lowrank.passes.decompose import decompositions
from onnx_lowrank.passes.decompose.network import NetworkFormat
from onnx_lowrank.passes.decompose.tensor_ring import balanced, ring, sensitivity, stabilised

METHODS = {name: method for name, method in decompositions().items() if isinstance(method, NetworkFormat)}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
SHAPES = [
    LayerShape(1, 16, 8, (3, 3)),
    LayerShape(1, 8, 12, (3,)),
    LayerShape(1, 8, 4, (1, 3)),
    LayerShape(1, 8, 4, (1, 3, 2)),
    LayerShape(1, 4, 8, (2, 3, 2)),
    LayerShape(1, 16, 24),
    LayerShape(1, 24, 8, (1, 1)),
]
CALIBRATED = (SHAPES[0], SHAPES[1], SHAPES[5])
RNG = np.random.default_rng(6)


def weight_of(shape: LayerShape, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal(shape.weight)


def some_ranks(method: NetworkFormat, shape: LayerShape, count: int = 6) -> list[Rank]:
    """Ranks worth pricing, thinned."""
    found = list(method.ranks(shape, 1))
    return found[:: max(1, len(found) // count)]


@every_method
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("calibrated", [False, True])
def test_errors(method: NetworkFormat, shape: LayerShape, calibrated: bool) -> None:
    """Told errors bound those of the factors and never rise with the rank."""
    if (refusal := method.refusal(shape)) is not None:
        assert str(shape) in refusal
        return
    if calibrated and shape not in CALIBRATED:
        return
    weight, gram = weight_of(shape), moment(shape, 1e3)
    made = method.factorize(weight, gram if calibrated else None)
    metric = gram if calibrated else np.eye(shape.inputs)[None]
    told: dict[Rank, float] = {}
    for rank in some_ranks(method, shape, 4 if calibrated else 8):
        chain, factors = method.chain(shape, rank), made.factors(rank)
        assert [factor.shape for factor in factors] == [stage.weight for stage in chain.stages]
        dense = chain.dense(factors)
        assert dense.shape == weight.shape
        told[rank] = made.error(rank)
        assert output_error(weight, dense, metric) <= told[rank] + 1e-6
    for rank, error in told.items():
        for other, less in told.items():
            below = rank[: method.structure] == other[: method.structure]
            if below and all(a <= b for a, b in zip(rank, other, strict=True)):
                assert less <= error + 1e-12


@every_method
@pytest.mark.parametrize("shape", CALIBRATED, ids=str)
def test_second_moments_never_do_harm(method: NetworkFormat, shape: LayerShape) -> None:
    """For the outputs, calibrated factors beat data-free ones, and refining them again does no harm."""
    if method.refusal(shape) is not None:
        return
    weight, gram = weight_of(shape), moment(shape, 1e3)
    plain, made = method.factorize(weight), method.factorize(weight, gram)
    gained = 0
    for rank in some_ranks(method, shape, 3):
        chain, start = method.chain(shape, rank), made.factors(rank)
        before = output_error(weight, chain.dense(plain.factors(rank)), gram)
        after = output_error(weight, chain.dense(start), gram)
        assert after <= before + 1e-9
        assert output_error(weight, chain.dense(refine(chain, start, weight, gram)), gram) <= after + 1e-9
        gained += after < 0.95 * before
    assert gained


@every_method
@pytest.mark.parametrize("gram", [0.0, np.nan])
def test_moments_that_say_nothing(method: NetworkFormat, gram: float) -> None:
    shape = next(shape for shape in SHAPES if method.refusal(shape) is None)
    weight, rank = weight_of(shape), method.ranks(shape, 1)[0]
    plain, made = method.factorize(weight), method.factorize(weight, np.full((1, shape.inputs, shape.inputs), gram))
    assert made.error(rank) == plain.error(rank)
    for ours, theirs in zip(made.factors(rank), plain.factors(rank), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@every_method
def test_zero_weights_cost_nothing(method: NetworkFormat) -> None:
    shape = next(shape for shape in SHAPES if method.refusal(shape) is None)
    made, rank = method.factorize(np.zeros(shape.weight)), method.ranks(shape, 1)[0]
    assert made.error(rank) == 0.0
    assert all(np.isfinite(factor).all() for factor in made.factors(rank))


@pytest.mark.parametrize("name", ["tt_matrix", "hierarchical_tucker"])
@pytest.mark.parametrize("kernel", [(1,), (1, 1, 1)])
def test_pointwise_convolutions_are_calibrated_as_matrices_are(name: str, kernel: Shape) -> None:
    method, matrix = METHODS[name], LayerShape(1, 128, 64)
    weight, gram = weight_of(matrix), moment(matrix, 1e2)
    made = method.factorize(weight, gram), method.factorize(weight.reshape(*matrix.weight, *kernel), gram)
    for rank in ((3, 4), (4, 3)):
        assert made[1].error(rank) == pytest.approx(made[0].error(rank), rel=1e-6)


EXACT: list[tuple[str, LayerShape, Rank]] = [
    ("kronecker", LayerShape(1, 12, 8, (3, 3)), (4, 2, 3, 1, 24)),
    ("kronecker", LayerShape(1, 6, 8), (3, 2, 6)),
    ("tt_matrix", LayerShape(1, 16, 24), (3, 8)),
    ("tt_matrix", LayerShape(1, 16, 24, (1, 1)), (4, 16)),
    ("hierarchical_tucker", LayerShape(1, 16, 24), (3, 8)),
    ("hierarchical_tucker", LayerShape(1, 16, 24), (4, 16)),
    ("tensor_ring", LayerShape(1, 8, 6, (3, 3)), (8, 1, 6)),
    ("semi_tensor", LayerShape(1, 8, 12, (3, 3)), (2, 12, 8)),
    ("semi_tensor", LayerShape(1, 8, 12), (4, 12, 8)),
    ("semi_tensor_train", LayerShape(1, 8, 12, (3, 2)), (2, 12, 16, 8)),
    ("semi_tensor_ring", LayerShape(1, 8, 12, (3,)), (2, 8, 1, 12)),
]


@pytest.mark.parametrize(("name", "shape", "rank"), EXACT, ids=str)
def test_exact_ranks(name: str, shape: LayerShape, rank: Rank) -> None:
    method, weight = METHODS[name], weight_of(shape)
    assert method.misfit(shape, rank) is None
    made = method.factorize(weight)
    assert made.error(rank) < 1e-5
    np.testing.assert_allclose(method.chain(shape, rank).dense(made.factors(rank)), weight, atol=1e-5)


def planted_kronecker() -> Array:
    a, b = RNG.standard_normal((2, 4, 2, 3, 1)), RNG.standard_normal((2, 3, 4, 1, 3))
    products = np.einsum("qscab,qtdef->qstcdae bf".replace(" ", ""), a, b)
    return products.sum(axis=0).reshape(1, 12, 8, 3, 3)


def planted_tt() -> Array:
    cores = random_tt_matrix((4, 3, 2, 2, 3, 4), rank=[1, 3, 3, 1], random_state=0)
    return np.asarray(tt_matrix_to_matrix(cores))[None]


def planted_tucker() -> Array:
    u, core, v = RNG.standard_normal((4, 2)), RNG.standard_normal((4, 6, 3)), RNG.standard_normal((3, 6))
    eye = np.eye(2)
    return np.einsum("sq,qpk,pc->sck", np.kron(u, eye), core, np.kron(v, eye))[None]


PLANTED: list[tuple[str, Callable[[], Array], Rank]] = [
    ("kronecker", planted_kronecker, (4, 2, 3, 1, 2)),
    ("tt_matrix", planted_tt, (3, 3)),
    ("hierarchical_tucker", planted_tt, (3, 9)),
    ("semi_tensor", planted_tucker, (2, 6, 4)),
]


@pytest.mark.parametrize(("name", "planted", "rank"), PLANTED, ids=[name for name, _, _ in PLANTED])
def test_planted_weights_are_found(name: str, planted: Callable[[], Array], rank: Rank) -> None:
    """Weights made with np.kron and with TensorLy, in the order of modes that the literature has."""
    weight = planted()
    groups, out, in_, *kernel = weight.shape
    shape = LayerShape(groups, out, in_, tuple(kernel))
    assert METHODS[name].misfit(shape, rank) is None
    assert METHODS[name].factorize(weight).error(rank) < 1e-5
    assert METHODS[name].factorize(weight, moment(shape, 1e2)).error(rank) < 1e-5


@every_method
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ranks_that_are_priced(method: NetworkFormat, shape: LayerShape) -> None:
    if method.refusal(shape) is not None:
        return
    ranks = method.ranks(shape, 16)
    assert len(set(ranks)) == len(ranks)
    assert len(method.promising(weight_of(shape), dict.fromkeys(ranks, 0.5))) <= 60
    for rank in ranks:
        assert method.chain(shape, rank).params < shape.params
        assert method.misfit(shape, rank) is None


def test_weights_of_tensor_trains_and_trees() -> None:
    """16 = 4 2 2 and 24 = 4 3 2, the larger output mode beside the smaller input mode."""
    shape = LayerShape(1, 16, 24)
    assert METHODS["tt_matrix"].chain(shape, (3, 5)).params == 4 * 2 * 5 + 5 * 2 * 3 * 5 + 5 * 2 * 4
    leaves, transfers = 5 * (4 * 2 + 2 * 3 + 2 * 4), 5 * 5 + 5**3
    assert METHODS["hierarchical_tucker"].chain(shape, (3, 5)).params == leaves + transfers
    assert len(METHODS["hierarchical_tucker"].chain(shape, (4, 2)).stages) == 4 + 3


def test_multiply_accumulates_count_every_copy() -> None:
    shape, proto = LayerShape(1, 16, 8, (3, 3)), conv_model((1, 8, 10, 10), (16, 8, 3, 3), pads=[1] * 4)
    graph = Graph(proto)
    (layer,), _ = layers(graph, check=False)
    assert layer.shape == shape
    chain = METHODS["tensor_ring"].chain(shape, (4, 2, 3))
    per_position = 8 * 2 * 3 + 2 * 3 * 4 * 9 + 16 * 2 * 4
    assert sum(stage.copies * stage.params for stage in chain.stages) == per_position
    kronecker = METHODS["kronecker"].chain(shape, (4, 2, 3, 1, 5))
    assert [stage.copies for stage in kronecker.stages] == [2, 4]


def test_sensitivity_is_the_energy_that_noise_adds() -> None:
    planted = [np.asarray(core) for core in random_tr((12, 10, 9), rank=[3, 2, 4, 3], random_state=1).factors]
    noise, levels = 1e-4, [float(np.sqrt(np.square(core).mean())) for core in planted]
    whole = np.einsum("asb,bce,eka->sck", *planted)
    energy = 0.0
    for _ in range(400):
        moved = (c + noise * v * RNG.standard_normal(c.shape) for c, v in zip(planted, levels, strict=True))
        energy += float(np.square(np.einsum("asb,bce,eka->sck", *moved) - whole).sum()) / 400 / noise**2
    assert sensitivity(planted) == pytest.approx(energy / float(np.square(whole).sum()), rel=0.1)


def test_a_bad_basis_of_a_bond_costs_nothing() -> None:
    cores: list[Array] = [RNG.standard_normal(size) for size in ((3, 16, 2), (2, 12, 4), (4, 9, 3))]
    tensor = np.einsum("asb,bce,eka->sck", *cores)
    bond = np.array([[1.0, 30.0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 30], [0, 0, 0, 1]])
    moved = [cores[0], cores[1] @ bond, np.einsum("fe,eka->fka", np.linalg.inv(bond), cores[2])]
    stable = balanced(moved)
    np.testing.assert_allclose(np.einsum("asb,bce,eka->sck", *stable), tensor, atol=1e-8)
    assert sensitivity(moved) > 100 * sensitivity(stable)
    assert sensitivity(ring(tensor + RNG.standard_normal(tensor.shape), (3, 2, 4))) < 10


def test_large_terms_that_cancel_are_brought_down() -> None:
    """The derivative of rank-one tensors is approached by two terms that grow without bound (border rank)."""
    x, dx, y, dy, z, dz = (RNG.standard_normal(size) for size in (12, 12, 10, 10, 9, 9))
    tensor = sum(np.einsum("s,c,k->sck", *term) for term in ((x, y, dz), (x, dy, z), (dx, y, z)))
    tensor = tensor + 0.3 * float(np.std(tensor)) * RNG.standard_normal((12, 10, 9))
    step, eye = 0.03, np.eye(2)
    u, v, w = (np.stack(pair, 1) for pair in ((x + step * dx, x), (y + step * dy, y), (z / step + dz, -z / step)))
    diagonal = ("sr,ar,br->asb", u), ("cr,br,er->bce", v), ("kr,er,ar->eka", w)
    cores = [np.einsum(equation, factor, eye, eye) for equation, factor in diagonal]
    stable = stabilised(tensor, cores)
    errors = [np.linalg.norm(tensor - np.einsum("asb,bce,eka->sck", *each)) for each in (stable, cores)]
    assert errors[0] <= 1.01 * errors[1]
    assert sensitivity(cores) > 5 * sensitivity(stable)
