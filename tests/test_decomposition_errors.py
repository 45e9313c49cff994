"""The contract of every decomposition, arrays only: errors, bounds, ranks, counts and refusals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from formats import EVERY, METHODS, comparable, some_ranks
from tensorly.decomposition import partial_tucker

from onnx_lowrank.decomposition import Decomposition, Rank, aligned
from onnx_lowrank.layer import LayerShape, Shape
from onnx_lowrank.passes.decompose.tucker2 import Tucker2

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
RNG = np.random.default_rng(5)
NARROW = [(3,), (1, 3), (3, 1), (1, 1, 3), (1, 3, 1)]


SHAPES = [
    LayerShape(1, 5, 4, (3, 3)),
    LayerShape(2, 4, 3, (3, 2)),
    LayerShape(1, 6, 3, (1, 5)),
    LayerShape(1, 4, 5, (3,)),
    LayerShape(1, 3, 4, (2, 3, 2)),
    LayerShape(1, 6, 9),
    LayerShape(3, 4, 5),
    LayerShape(1, 7, 4, (1, 1)),
]


@every_method
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_errors_never_rise_with_the_rank(method: Decomposition, shape: LayerShape) -> None:
    if method.refusal(shape) is not None:
        return
    limit = method.exact_rank(shape)
    assert limit is not None
    made = method.factorize(RNG.standard_normal(shape.weight))
    ranks = some_ranks(method, shape)
    for less, more in itertools.permutations(ranks, 2):
        if comparable(method, less, more):
            assert made.error(more) <= made.error(less) + 1e-12
    assert made.error(limit) == pytest.approx(0, abs=1e-7)


FORMULAS: dict[str, Callable[[int, int, Sequence[int], Rank], int]] = {
    "svd": lambda s, c, k, r: r[0] * c * math.prod(k) + s * r[0],
    "svd_input": lambda s, c, k, r: r[0] * c + s * r[0] * math.prod(k),
    "spatial_svd": lambda s, c, k, r: r[0] * c * k[0] + s * r[0] * math.prod(k[1:]),
    "spatial_svd_reversed": lambda s, c, k, r: r[0] * c * math.prod(k[1:]) + s * r[0] * k[0],
    "tucker2": lambda s, c, k, r: r[0] * c + r[0] * r[1] * math.prod(k) + s * r[1],
    "grouped_svd": lambda s, c, k, r: r[1] * c * math.prod(k) + s * r[0] * r[1],
    "cp": lambda s, c, k, r: r[0] * (c + math.prod(k) + s),
    "cp_spatial": lambda s, c, k, r: r[0] * (c + sum(k) + s),
    "block_term": lambda s, c, k, r: r[0] * (r[1] * c + r[1] * r[2] * math.prod(k) + s * r[2]),
    "tensor_train": lambda s, c, k, r: c * r[0] + r[0] * k[0] * r[1] + r[1] * math.prod(k[1:]) * r[2] + r[2] * s,
}


@every_method
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_of_the_chain_follow_the_published_formula(method: Decomposition, shape: LayerShape) -> None:
    if method.name not in FORMULAS or method.refusal(shape) is not None:
        return
    for rank in some_ranks(method, shape):
        expected = shape.groups * FORMULAS[method.name](shape.out, shape.in_, shape.kernel, rank)
        assert method.chain(shape, rank).params == expected


@every_method
@pytest.mark.parametrize("block", [1, 4, 16])
@pytest.mark.parametrize("shape", [LayerShape(1, 48, 40, (3, 3)), LayerShape(2, 12, 20, (5, 1)), LayerShape(1, 64, 30)])
def test_ranks_are_aligned_and_save_weights(method: Decomposition, shape: LayerShape, block: int) -> None:
    if method.refusal(shape) is not None:
        return
    ranks = method.ranks(shape, block)
    assert ranks
    assert len(set(ranks)) == len(ranks)
    for rank in ranks:
        assert method.chain(shape, rank).params < shape.params
        assert all(part % block == 0 or block % part == 0 for part in rank[method.structure :])
        assert method.misfit(shape, rank) is None


@pytest.mark.parametrize("kernel", [(1, 3, 2), (3, 1, 2), (3, 2, 1)])
@pytest.mark.parametrize(
    "name", ["spatial_svd", "spatial_svd_reversed", "tensor_train", "cp_spatial", "semi_tensor_train"]
)
def test_the_first_axis_longer_than_one_is_split_from_the_others(name: str, kernel: Shape) -> None:
    """(2+1)-dimensional layers have their axis of length one in front."""
    shape, method = LayerShape(1, 8, 8, kernel), EVERY[name]
    assert method.refusal(shape) is None
    rank = method.exact_rank(shape) or (2, 8, 24, 8)
    chain, weight = method.chain(shape, rank), np.random.default_rng(0).standard_normal(shape.weight)
    kernels = [stage.kernel for stage in chain.stages if math.prod(stage.kernel) > 1]
    split = [tuple(k if axis == one else 1 for axis, k in enumerate(kernel)) for one in range(3) if kernel[one] > 1]
    assert kernels == (split[::-1] if name == "spatial_svd_reversed" else split)
    np.testing.assert_allclose(chain.dense(method.factorize(weight).factors(rank)), weight, atol=1e-9)


@pytest.mark.parametrize(("name", "kernel"), [(n, k) for n in ("spatial_svd", "spatial_svd_reversed") for k in NARROW])
def test_the_twin_that_a_refusal_names_gives_the_same_chain(name: str, kernel: Shape) -> None:
    shape, method = LayerShape(1, 8, 8, kernel), METHODS[name]
    (twin,) = (other for key, other in METHODS.items() if f": {key} gives" in (method.refusal(shape) or ""))
    mine, its = (each.chain(shape, (3,)).stages for each in (method, twin))
    assert [(s.out, s.in_, s.kernel) for s in mine] == [(s.out, s.in_, s.kernel) for s in its]


@every_method
def test_zero_weights_cost_nothing(method: Decomposition) -> None:
    shape = LayerShape(1, 4, 3, (3, 3))
    made = method.factorize(np.zeros(shape.weight))
    rank = tuple(1 for _ in method.exact_rank(shape) or ())
    assert made.error(rank) == 0.0
    assert all(np.isfinite(factor).all() for factor in made.factors(rank))


@pytest.mark.parametrize(
    ("method", "shape", "sentence"),
    [
        ("svd", LayerShape(1, 1, 9), "9->1 is a vector: there is no rank to cut"),
        ("svd_input", LayerShape(1, 8, 9, (1, 1)), "9->8 1x1 has no kernel: svd gives the same chain"),
        ("svd_input", LayerShape(4, 1, 1, (3, 3)), "4*1->1 3x3 has one channel on a side: there is no rank to cut"),
        (
            "spatial_svd",
            LayerShape(1, 8, 9, (3,)),
            "9->8 3 has one spatial axis: svd gives the same chain",
        ),
        (
            "spatial_svd",
            LayerShape(1, 8, 9, (1, 3)),
            "9->8 1x3 has one spatial axis: svd gives the same chain",
        ),
        (
            "spatial_svd_reversed",
            LayerShape(1, 8, 9, (3, 1)),
            "9->8 3x1 has one spatial axis: svd_input gives the same chain",
        ),
        ("spatial_svd", LayerShape(1, 8, 9, (1, 1)), "9->8 1x1 has no kernel: there is nothing to separate"),
        ("tucker2", LayerShape(1, 8, 9), "9->8 has no kernel: svd reaches the same error with one stage less"),
        (
            "tucker2",
            LayerShape(1, 8, 1, (3, 3)),
            "1->8 3x3 has one channel on a side: svd gives the same chain with one stage less",
        ),
        ("grouped_svd", LayerShape(1, 8, 9), "9->8 is a matrix product: its stages cannot have groups of their own"),
        (
            "grouped_svd",
            LayerShape(4, 2, 1, (3, 3)),
            "4*1->2 3x3 has one input channel per group: there is nothing to slice",
        ),
        ("grouped_svd", LayerShape(1, 1, 9, (3, 3)), "9->1 3x3 is a vector: there is no rank to cut"),
        ("cp", LayerShape(1, 8, 9, (1, 1)), "9->8 1x1 has no kernel: svd reaches the same error with fewer stages"),
        ("cp_spatial", LayerShape(1, 8, 9, (3,)), "9->8 3 has one spatial axis: cp gives the same chain"),
        (
            "block_term",
            LayerShape(4, 1, 1, (3, 3)),
            "4*1->1 3x3 has one channel on a side: svd reaches the same error with fewer stages",
        ),
        ("tensor_train", LayerShape(1, 8, 9, (3,)), "9->8 3 has one spatial axis: tucker2 gives the same chain"),
        (
            "tensor_train",
            LayerShape(1, 8, 1, (3, 3)),
            "1->8 3x3 has one channel on a side: spatial_svd needs fewer stages",
        ),
    ],
)
def test_refusals(method: str, shape: LayerShape, sentence: str) -> None:
    assert METHODS[method].refusal(shape) == sentence


@pytest.mark.parametrize(
    ("method", "rank", "expected"),
    [
        ("svd", (9,), "1 to 8"),
        ("tucker2", (3,), "1 to 6x8"),
        ("grouped_svd", (4, 2), "a divisor of 6 and a rank"),
        ("grouped_svd", (6, 9), "1 to 8 in 6 groups"),
        ("block_term", (2, 7, 2), "blocks of 1x1 to 6x8"),
    ],
)
def test_ranks_a_layer_cannot_have(method: str, rank: Rank, expected: str) -> None:
    assert METHODS[method].misfit(LayerShape(1, 8, 6, (3, 3)), rank) == expected


def test_hooi_improves_on_truncated_hosvd() -> None:
    shape = LayerShape(1, 12, 10, (3, 3))
    weight = RNG.standard_normal(shape.weight)
    errors: list[float] = []
    for sweeps in (0, 3):
        method = Tucker2(sweeps=sweeps)
        made = method.factorize(weight)
        product = method.chain(shape, (4, 5)).dense(made.factors((4, 5)))
        errors.append(float(np.linalg.norm(weight - product) / np.linalg.norm(weight)))
        assert errors[-1] <= made.error((4, 5)) + 1e-12
    assert errors[0] == pytest.approx(made.error((4, 5)), abs=1e-10)
    assert errors[1] < errors[0]


@pytest.mark.parametrize(
    ("limit", "block", "ranks"),
    [(40, 16, [1, 2, 4, 8, 16, 32]), (7, 16, [1, 2, 4]), (4, 1, [1, 2, 3, 4]), (0, 8, []), (8, 8, [1, 2, 4, 8])],
)
def test_aligned(limit: int, block: int, ranks: list[int]) -> None:
    assert aligned(limit, block) == ranks


@pytest.mark.parametrize("ranks", [(3, 4), (5, 2), (6, 8)])
def test_tucker2_is_as_good_as_tensorly(ranks: Rank) -> None:
    """TensorLy's partial Tucker decomposition, HOOI run to convergence, is the reference."""
    weight = RNG.standard_normal((8, 6, 3, 3))
    (core, (u_out, u_in)), _ = partial_tucker(weight, rank=[ranks[1], ranks[0]], modes=[0, 1], tol=1e-10)
    reference = np.linalg.norm(weight - np.einsum("qphw,sq,cp->schw", core, u_out, u_in)) / np.linalg.norm(weight)
    method, shape = Tucker2(sweeps=20), LayerShape(1, 8, 6, (3, 3))
    ours = method.chain(shape, ranks).dense(method.factorize(weight[None]).factors(ranks))[0]
    assert np.linalg.norm(weight - ours) / np.linalg.norm(weight) <= reference * 1.001 + 1e-7


@pytest.mark.parametrize(
    ("name", "option"),
    [("cp", "restarts"), ("cp", "sweeps"), ("cp_spatial", "restarts"), ("cp_spatial", "sweeps"),
     ("block_term", "restarts"), ("block_term", "sweeps"), ("tucker2", "sweeps")],
)  # fmt: skip
def test_counts_are_not_negative(name: str, option: str) -> None:
    with pytest.raises(ValueError, match=f"^{option}=-1; expected 0 or more$"):
        replace(METHODS[name], **{option: -1})  # pyright: ignore[reportArgumentType] - decompositions are dataclasses
    shape, method = LayerShape(1, 6, 5, (3, 3)), replace(METHODS[name], **{option: 0})  # pyright: ignore[reportArgumentType] - likewise
    assert method.factorize(RNG.standard_normal(shape.weight)).error(method.ranks(shape, 1)[0]) < 1
