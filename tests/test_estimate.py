"""Medians and intervals of made-up timings whose truth is known: near it, and covering it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from onnx_lowrank.latency.estimate import median_interval, ratio_of

Array = NDArray[np.float64]
Noise = Callable[[np.random.Generator, int], tuple[Array, Array]]
TRIALS = 300


def drift(rng: np.random.Generator, rounds: int) -> tuple[Array, Array]:
    """Both slow down and speed up together by 40 %."""
    both = 1 + 0.4 * np.sin(np.arange(rounds) / rounds * 6 + rng.uniform(0, 6))
    return both, both


def bursts(rng: np.random.Generator, rounds: int) -> tuple[Array, Array]:
    """Each is up to three times as slow for a while, in different rounds."""
    hit = [np.ones(rounds), np.ones(rounds)]
    for one in hit:
        start = rng.integers(0, rounds)
        one[start : start + max(1, rounds // 12)] *= rng.uniform(1.5, 3)
    return hit[0], hit[1]


def common_burst(rng: np.random.Generator, rounds: int) -> tuple[Array, Array]:
    """A quarter of the rounds is slow for both."""
    both = np.ones(rounds)
    start = rng.integers(0, rounds)
    both[start : start + rounds // 4] *= rng.uniform(1.5, 3)
    return both, both


def bimodal(rng: np.random.Generator, rounds: int) -> tuple[Array, Array]:
    """Three runs in ten of each are slow by 8 %."""
    return np.where(rng.random(rounds) < 0.3, 1.08, 1), np.where(rng.random(rounds) < 0.3, 1.08, 1)


def heavy_tails(rng: np.random.Generator, rounds: int) -> tuple[Array, Array]:
    """Delays that have no mean."""
    return 1 + 0.01 * abs(rng.standard_cauchy(rounds)), 1 + 0.01 * abs(rng.standard_cauchy(rounds))


def lasting(rng: np.random.Generator, rounds: int) -> tuple[Array, Array]:
    """One of them wanders, so that neighbouring rounds are alike."""
    wander = np.zeros(rounds)
    for i in range(1, rounds):
        wander[i] = 0.5 * wander[i - 1] + rng.normal(0, 0.01)
    return np.exp(wander), np.ones(rounds)


@pytest.mark.parametrize("rounds", [25, 60])
@pytest.mark.parametrize("noise", [drift, bursts, common_burst, bimodal, heavy_tails, lasting])
def test_near_the_truth_and_covering_it(noise: Noise, rounds: int) -> None:
    near = covered = 0
    for seed in range(TRIALS):
        rng = np.random.default_rng(seed)
        truth = rng.uniform(0.5, 3)
        slow, fast = (one * rng.lognormal(0, 0.01, rounds) for one in noise(rng, rounds))
        found = ratio_of(10 * slow / (10 / truth * fast))
        near += abs(found.value / truth - 1) <= 0.02
        covered += found.low <= truth <= found.high
    assert near >= 0.95 * TRIALS
    assert covered >= 0.9 * TRIALS


@pytest.mark.parametrize("rounds", [9, 15])
@pytest.mark.parametrize("noise", [drift, bursts, common_burst, bimodal, heavy_tails])
def test_few_rounds_are_covered_too(noise: Noise, rounds: int) -> None:
    covered = 0
    for seed in range(TRIALS):
        rng = np.random.default_rng(seed)
        slow, fast = (one * rng.lognormal(0, 0.01, rounds) for one in noise(rng, rounds))
        found = ratio_of(slow / fast)
        covered += found.low <= 1 <= found.high
    assert covered >= 0.9 * TRIALS


def test_independent_samples_get_the_order_statistics_of_the_sign_test() -> None:
    # Of 9 independent samples the second and the eighth enclose the median 96 times in 100.
    assert median_interval(np.array([3.0, 7, 1, 9, 5, 2, 8, 4, 6])) == (2.0, 8.0)


def test_noise_that_lasts_widens_the_interval() -> None:
    values = np.concatenate([np.arange(20.0), np.arange(20.0) + 0.5])
    mixed = np.random.default_rng(0).permutation(values)
    low, high = median_interval(np.sort(values))
    narrow_low, narrow_high = median_interval(mixed)
    assert high - low > 1.5 * (narrow_high - narrow_low)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 60))
def test_interval_holds_the_median_and_scales(seed: int, count: int) -> None:
    samples = np.random.default_rng(seed).lognormal(size=count)
    low, high = median_interval(samples)
    assert samples.min() <= low <= np.median(samples) <= high <= samples.max()
    assert median_interval(samples * 3) == pytest.approx((low * 3, high * 3))


def test_rounds_a_model_rested_in_do_not_count() -> None:
    taken = np.array([2.0, 2.1, 1.9, 2.05, 1.95])
    assert ratio_of(np.insert(taken, [1, 3], np.nan)) == ratio_of(taken)
