"""grouped_svd, tensor_train and block_term against numpy, TensorLy and planted weights; shared axes in equations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tensorly as tl
from tensorly.decomposition import tensor_train

from onnx_lowrank.chain import Chain, Stage
from onnx_lowrank.decomposition import Rank, spaced
from onnx_lowrank.layer import Array, LayerShape
from onnx_lowrank.passes.decompose import block_term, decompositions
from onnx_lowrank.passes.decompose.block_term import Blocks, BlockTerm

METHODS = decompositions()
SHAPE = LayerShape(1, 12, 8, (3, 3))
WEIGHT = np.random.default_rng(3).standard_normal(SHAPE.weight)


@pytest.mark.parametrize("slices", [1, 2, 4, 8])
def test_slices_have_numpys_singular_values(slices: int) -> None:
    """ALDS compares sqrt(k) max_i sigma_{i,j+1} / ||W||_2."""
    matrix = WEIGHT[0].reshape(12, -1)
    sigma = [np.linalg.svd(part, compute_uv=False) for part in np.split(matrix, slices, axis=1)]
    made = METHODS["grouped_svd"].factorize(WEIGHT)
    for j in range(1, min(12, 72 // slices)):
        tail = np.sqrt(sum(np.square(values[j:]).sum() for values in sigma)) / np.linalg.norm(matrix)
        assert made.error((slices, j)) == pytest.approx(tail, abs=1e-7)
        largest = math.sqrt(slices) * max(values[j] for values in sigma) / np.linalg.norm(matrix, 2)
        assert made.spectral_error((slices, j)) == pytest.approx(largest, abs=1e-7)


def test_one_slice_is_svd() -> None:
    grouped, svd = METHODS["grouped_svd"], METHODS["svd"]
    assert grouped.chain(SHAPE, (1, 5)).stages == svd.chain(SHAPE, (5,)).stages
    assert grouped.factorize(WEIGHT).error((1, 5)) == pytest.approx(svd.factorize(WEIGHT).error((5,)))


@pytest.mark.parametrize("ranks", [(3, 4, 5), (6, 9, 8), (8, 20, 11)])
def test_trains_are_as_good_as_tensorlys(ranks: Rank) -> None:
    tensor = WEIGHT[0].transpose(1, 2, 3, 0)
    theirs = tl.tt_to_tensor(tensor_train(tensor, rank=[1, *ranks, 1]))
    reference = np.linalg.norm(tensor - theirs) / np.linalg.norm(tensor)
    assert METHODS["tensor_train"].factorize(WEIGHT).error(ranks) <= 1.03 * reference


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_planted_blocks_are_found(groups: int, seed: int) -> None:
    shape, method = LayerShape(groups, 12, 10, (3, 3)), BlockTerm(restarts=6, sweeps=200)
    chain, rng = method.chain(shape, (2, 2, 3)), np.random.default_rng(seed)
    weight = chain.dense([rng.standard_normal(stage.weight) for stage in chain.stages])
    assert method.factorize(weight).error((2, 2, 3)) < 1e-3


def test_planted_blocks_are_found_in_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last sweeps, of the whole weight, are in double precision: what is left is below that of single precision."""
    monkeypatch.setattr(block_term, "LARGE", 0)
    shape, method, rank = LayerShape(1, 64, 60, (3, 3)), BlockTerm(restarts=6), (2, 4, 5)
    chain, rng = method.chain(shape, rank), np.random.default_rng(0)
    weight = chain.dense([rng.standard_normal(stage.weight) for stage in chain.stages])
    noise = rng.standard_normal(weight.shape) * 1e-6 * np.linalg.norm(weight) / np.sqrt(weight.size)
    made = method.factorize(weight + noise)
    assert made.error(rank) < 5e-6
    assert all(factor.dtype == np.float64 for factor in made.factors(rank))


def scaled(spread: float, channels: int, seed: int) -> Array:
    """A weight whose channels' norms range over e^(2 spread) and more, at both ends."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((1, channels, channels, 3, 3))
    outer, inner = (np.exp(spread * rng.standard_normal(channels)) for _ in range(2))
    return weight * outer[:, None, None, None] * inner[:, None, None]


def pruned(channels: int, live: int, rest: float) -> Array:
    """A weight of which some channels at both ends are next to nothing."""
    weight = np.random.default_rng(0).standard_normal((1, channels, channels, 3, 3))
    kept = np.where(np.arange(channels) < live, 1.0, rest)
    return weight * kept[:, None, None, None] * kept[:, None, None]


def lean(channels: int, rank: int) -> Array:
    """A weight of low multilinear rank, which fewer blocks reproduce."""
    rng = np.random.default_rng(1)
    ends = rng.standard_normal((2, channels, rank))
    return np.einsum("sa,abkl,cb->sckl", ends[0], rng.standard_normal((rank, rank, 3, 3)), ends[1])[None]


NEARLY_EXACT: dict[str, tuple[Array, Rank, float]] = {
    "channels of all sizes": (scaled(3, 128, 23), (2, 48, 48), 3e-4),
    "other channels of all sizes": (scaled(3, 128, 22), (2, 48, 48), 2e-4),
    "nearly pruned": (pruned(128, 16, 1e-4), (4, 24, 24), 2e-4),
    "pruned": (pruned(128, 16, 0), (4, 24, 24), 1e-4),
    "low rank": (lean(96, 10), (8, 12, 12), 1e-4),
    "lower than all blocks": (lean(128, 12), (8, 16, 16), 1e-4),
}


@pytest.mark.parametrize("name", NEARLY_EXACT)
@pytest.mark.filterwarnings("error")
def test_nearly_dependent_blocks_do_not_diverge(name: str) -> None:
    """Stored in single precision, too, as they are written: terms that cancel inside of a block would show."""
    weight, rank, most = NEARLY_EXACT[name]
    made, chain = (
        METHODS["block_term"].factorize(weight),
        METHODS["block_term"].chain(LayerShape(1, weight.shape[1], weight.shape[2], (3, 3)), rank),
    )
    stored = [factor.astype(np.float32).astype(np.float64) for factor in made.factors(rank)]
    assert made.error(rank) < most
    assert np.linalg.norm(chain.dense(stored) - weight) < most * np.linalg.norm(weight)


@pytest.mark.parametrize(("left", "right"), [(3, 4), (11, 4), (3, 13), (12, 14)])
def test_orthonormal_blocks_are_the_same_blocks(left: int, right: int) -> None:
    """Also where there are more than channels, and where they are nearly dependent."""
    rng = np.random.default_rng(0)
    first, last = rng.standard_normal((2, left, 8)), rng.standard_normal((2, 12, right))
    first[:, 1] = first[:, 0] * (1 + 1e-9)
    blocks = Blocks(first, rng.standard_normal((2, right, left, 9)), last)
    found = blocks.orthonormal()
    np.testing.assert_allclose(found.dense, blocks.dense, rtol=1e-9, atol=1e-9)
    assert [part.shape for part in found.parts] == [part.shape for part in blocks.parts]
    for gram in (found.first @ found.first.swapaxes(1, 2), found.last.swapaxes(1, 2) @ found.last):
        np.testing.assert_allclose(gram, np.stack([np.diag(np.diag(each)) for each in gram]), atol=1e-12)


@pytest.mark.parametrize("scale", [1e-25, 1e20])
def test_blocks_do_not_depend_on_the_scale(scale: float) -> None:
    weight = np.random.default_rng(0).standard_normal((1, 64, 64, 3, 3))
    errors = [METHODS["block_term"].factorize(weight * each).error((2, 24, 24)) for each in (1.0, scale)]
    assert errors[1] == pytest.approx(errors[0], rel=1e-4)


@pytest.mark.parametrize("most", [1, 4, 10, 12])
def test_blocks_take_no_more_sweeps_than_asked_for(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Array] = []
    whole = block_term._with_first

    def counted(weight: Array, blocks: Blocks) -> Blocks:
        made.append(weight)
        return whole(weight, blocks)

    monkeypatch.setattr(block_term, "_with_first", counted)
    BlockTerm(restarts=0, sweeps=most).factorize(WEIGHT).error((2, 2, 3))
    assert 0 < len(made) <= most


def test_shared_axes_need_another_stage_that_says_their_lengths() -> None:
    chain = Chain("unknown", (Stage(6, 2, 3), Stage(1, 4, 12)), "(ab)rc,gs(abr)->gs(abc)")
    with pytest.raises(ValueError, match="expected one whose shared axes follow from others"):
        _ = chain.sizes


@pytest.mark.parametrize(
    ("limit", "block", "ranks"),
    [(50, 1, [1, 2, 3, 4, 6, 8, 11, 15, 20, 26, 34, 45]), (100, 16, [1, 2, 4, 8, 16, 32, 48, 64, 96])],
)
def test_spaced(limit: int, block: int, ranks: list[int]) -> None:
    assert spaced(limit, block) == ranks
