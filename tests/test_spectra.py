"""Measures of a spectrum against closed forms, and EVB against planted ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import entropy

from onnx_lowrank.layer import Array
from onnx_lowrank.spectra import ENERGIES, Measures, Unfolding, effective_rank, energy_rank, evb_rank, gini, hoyer

positive = hnp.arrays(np.float64, st.integers(2, 12), elements=st.floats(1e-3, 1e3))
SEEDS = range(20)
LINES, COLUMNS, RANK = 120, 400, 5
# What the theory says is found in noise of unit variance: gamma^2 / M above this; in the limit of large matrices.
THRESHOLD = 2.5129 * math.sqrt(LINES / COLUMNS)


def test_all_values_equal() -> None:
    found = Measures.of(np.full((1, 20), 3.0), (20, 50))
    assert (found.full_rank, found.energy_ranks) == (20, (18, 19, 20))
    assert [found.effective_rank, found.stable_rank, found.nuclear_norm] == pytest.approx([20, 20, 60])
    assert [found.gini, found.hoyer] == pytest.approx([0, 0], abs=1e-12)


def test_one_value() -> None:
    found = Measures.of(np.array([[4.0, 0, 0, 0, 0]]), (5, 9))
    assert (found.full_rank, found.energy_ranks, found.evb_rank) == (5, (1, 1, 1), 1)
    assert [found.effective_rank, found.stable_rank, found.nuclear_norm] == pytest.approx([1, 1, 4])
    assert [found.gini, found.hoyer] == pytest.approx([1 - 1 / 5, 1])


@pytest.mark.parametrize("q", [0.5, 0.9])
def test_geometric_decay(q: float) -> None:
    """sigma_h = q^h: stable rank (1 - q^2n) / (1 - q^2), nuclear norm (1 - q^n) / (1 - q), entropy as scipy has it."""
    n = 15
    sigma = q ** np.arange(n)
    found = Measures.of(sigma[None], (n, 40))
    l1, l2 = (1 - q**n) / (1 - q), math.sqrt((1 - q ** (2 * n)) / (1 - q**2))
    assert found.stable_rank == pytest.approx(l2**2)
    assert found.nuclear_norm == pytest.approx(l1)
    assert found.effective_rank == pytest.approx(math.exp(entropy(sigma)))
    assert found.hoyer == pytest.approx((math.sqrt(n) - l1 / l2) / (math.sqrt(n) - 1))
    # 1 - q^2r >= share (1 - q^2n)
    exact = [math.ceil(math.log(1 - share * (1 - q ** (2 * n))) / math.log(q**2)) for share in ENERGIES]
    assert list(found.energy_ranks) == exact


@settings(deadline=None, max_examples=50)
@given(positive)
def test_gini_is_half_the_relative_mean_difference(values: Array) -> None:
    difference = np.abs(values[:, None] - values[None]).mean()
    assert gini(values) == pytest.approx(difference / (2 * values.mean()), abs=1e-9)


@settings(deadline=None, max_examples=50)
@given(positive, st.floats(1e-3, 1e3))
def test_shape_not_size(values: Array, scale: float) -> None:
    for measure in (gini, hoyer, effective_rank):
        assert measure(scale * values) == pytest.approx(measure(values), abs=1e-6)
    assert 1 <= effective_rank(values) <= len(values) + 1e-9
    assert -1e-9 <= hoyer(values) <= 1


@settings(deadline=None, max_examples=50)
@given(positive, st.floats(0.01, 1))
def test_the_energy_rank_is_the_smallest(values: Array, share: float) -> None:
    sigma = np.sort(values)[::-1]
    kept = np.cumsum(sigma**2) / np.sum(sigma**2)
    rank = energy_rank(sigma, share)
    assert kept[rank - 1] >= share - 1e-9
    assert rank == 1 or kept[rank - 2] < share


def test_a_weight_of_zeros() -> None:
    found = Measures.of(np.zeros((2, 4)), (4, 6))
    assert (found.effective_rank, found.stable_rank, found.evb_rank, found.energy_ranks) == (0, 0, 0, (1, 1, 1))


def test_a_stack_is_measured_at_a_common_rank() -> None:
    """Two groups, one twice the other: shapes of the spectra are alike, and so is that of the stack."""
    sigma = 0.7 ** np.arange(6)
    one, both = Measures.of(sigma[None], (6, 30)), Measures.of(np.stack([sigma, 2 * sigma]), (6, 30))
    assert both.effective_rank == pytest.approx(one.effective_rank)
    assert (both.energy_ranks, both.full_rank) == (one.energy_ranks, one.full_rank)
    assert both.nuclear_norm == pytest.approx(3 * one.nuclear_norm)


@pytest.mark.parametrize("axes", [(), (0,), (1,), (0, 1)])
def test_unfoldings_are_those_of_the_weight(axes: tuple[int, ...]) -> None:
    weight = np.random.default_rng(0).standard_normal((2, 4, 3, 2, 5))
    rows = [1 + d for d in range(1) if d == 0] + [3 + a for a in (0, 1) if a not in axes]
    matrices = np.moveaxis(weight, [0, *rows], range(1 + len(rows))).reshape(
        2, math.prod(np.take(weight.shape, rows)), -1
    )
    found = Unfolding.of(weight, axes)
    assert found.shape == matrices.shape[1:]
    assert found.values == pytest.approx(np.linalg.svd(matrices, compute_uv=False))


def noisy(strength: float, seed: int) -> Array:
    """Singular values of RANK planted components, gamma^2 = strength M, and noise of unit variance."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.standard_normal((side, RANK)))[0] for side in (LINES, COLUMNS))
    signal = math.sqrt(strength * COLUMNS) * u @ v.T
    return np.linalg.svd(signal + rng.standard_normal((LINES, COLUMNS)), compute_uv=False)[None]


@pytest.mark.parametrize("seed", SEEDS)
def test_evb_finds_what_stands_out_of_the_noise(seed: int) -> None:
    assert evb_rank(noisy(1.5 * THRESHOLD, seed), (LINES, COLUMNS)) == RANK
    assert evb_rank(1e-3 * noisy(1.5 * THRESHOLD, seed), (COLUMNS, LINES)) == RANK


@pytest.mark.parametrize("seed", SEEDS)
def test_evb_finds_nothing_in_noise_nor_what_drowns_in_it(seed: int) -> None:
    assert evb_rank(noisy(0.0, seed), (LINES, COLUMNS)) == 0
    assert evb_rank(noisy(0.6 * THRESHOLD, seed), (LINES, COLUMNS)) == 0


@pytest.mark.parametrize("rank", [1, 5, 20])
def test_evb_without_noise(rank: int) -> None:
    rng = np.random.default_rng(rank)
    matrix = rng.standard_normal((40, rank)) @ rng.standard_normal((rank, 90))
    assert evb_rank(np.linalg.svd(matrix, compute_uv=False)[None], (40, 90)) == rank
