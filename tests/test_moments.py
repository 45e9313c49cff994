"""Second moments collected block by block against those of all rows at once, in float64."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_lowrank.calibration.moments import Accumulator, CrossAccumulator, Moments
from onnx_lowrank.layer import Array


@pytest.fixture(autouse=True, scope="module")
def small_chunks() -> Iterator[None]:
    """Blocks are taken in one by one, not all at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("onnx_lowrank.calibration.moments.LEAST_CHUNK", 1)
        yield


SIZES = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 4), st.integers(2, 200))


def drawn(sizes: tuple[int, int, int, int], seed: int, offset: float = 0.0) -> tuple[Array, Array]:
    """Correlated rows (rows, groups, n) about `offset`, and outputs (rows, groups, out) that depend on them."""
    groups, n, out, count = sizes
    rng = np.random.default_rng(seed)
    mix, weight = rng.standard_normal((groups, n, n)), rng.standard_normal((groups, out, n))
    rows = np.einsum("gnm,rgm->rgn", mix, rng.standard_normal((count, groups, n))) + offset
    targets = np.einsum("gsn,rgn->rgs", weight, rows) + rng.standard_normal((count, groups, out))
    return rows, targets


def collected(rows: Array, targets: Array, block: int) -> Moments:
    sums = Accumulator(rows.shape[1], rows.shape[2], targets.shape[2])
    for first in range(0, len(rows), block):
        sums.add(rows[first : first + block], targets[first : first + block])
    assert sums.count == len(rows)
    return sums.moments()


def direct(rows: Array, targets: Array) -> Moments:
    """The definitions, word by word."""
    x, y = rows.astype(np.float64), targets.astype(np.float64)
    c, d = x - x.mean(axis=0), y - y.mean(axis=0)
    cov = np.einsum("rgn,rgm->gnm", c, c) / len(x)
    square = np.square(cov).sum(axis=(1, 2))
    delta = square - np.square(np.trace(cov, axis1=1, axis2=2)) / x.shape[2]
    beta = np.mean([np.square(np.einsum("gn,gm->gnm", row, row) - cov).sum(axis=(1, 2)) for row in c], axis=0) / len(x)
    spread = np.array([b / d if b < d else float(b > 1e-12) for b, d in zip(beta, delta, strict=True)])
    return Moments(len(x), x.mean(axis=0), cov, y.mean(axis=0), np.einsum("rgs,rgn->gsn", d, c) / len(x), spread)


def assert_close(one: Moments, two: Moments, tolerance: float) -> None:
    assert one.count == two.count
    for name in ("mean", "cov", "y_mean", "cross"):
        a, b = np.asarray(getattr(one, name)), np.asarray(getattr(two, name))
        assert a.shape == b.shape
        least = 1.0 if "mean" in name else 1e-3  # values of about 1 may cancel to any mean
        assert np.abs(a - b).max(initial=0.0) <= tolerance * max(float(np.abs(b).max(initial=0.0)), least), name


@settings(deadline=None, max_examples=40)
@given(SIZES, st.integers(0, 99), st.sampled_from([0.0, 3.0, -1e3]), st.integers(1, 70))
def test_blocks_add_up_to_the_moments_of_all_rows(
    sizes: tuple[int, int, int, int], seed: int, offset: float, block: int
) -> None:
    rows, targets = drawn(sizes, seed, offset)
    got, wanted = collected(rows, targets, block), direct(rows, targets)
    assert_close(got, wanted, 1e-6)
    if sizes[1] > 1:  # of a single input delta is zero but for rounding
        np.testing.assert_allclose(got.spread, wanted.spread, rtol=1e-6, atol=1e-9)


@settings(deadline=None, max_examples=30)
@given(SIZES, st.integers(0, 99), st.integers(1, 70), st.integers(1, 70))
def test_neither_batch_size_nor_order_matter(sizes: tuple[int, int, int, int], seed: int, one: int, two: int) -> None:
    rows, targets = (array.astype(np.float32) for array in drawn(sizes, seed, 1.0))
    order = np.random.default_rng(seed).permutation(len(rows))
    a, b = collected(rows, targets, one), collected(rows[order], targets[order], two)
    assert_close(a, b, 1e-5)
    if sizes[1] > 1:
        np.testing.assert_allclose(a.spread, b.spread, rtol=1e-3, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(SIZES, st.integers(0, 99), st.sampled_from([0.0, 3.0, 100.0]))
def test_float32_agrees_with_float64(sizes: tuple[int, int, int, int], seed: int, offset: float) -> None:
    rows, targets = (array.astype(np.float32) for array in drawn(sizes, seed, offset))
    exact = collected(rows.astype(np.float64), targets.astype(np.float64), 16)
    assert_close(collected(rows, targets, 16), exact, 1e-5)


def test_about_zero_and_about_the_mean() -> None:
    rows, targets = drawn((2, 5, 3, 50), 1, 2.0)
    found = collected(rows, targets, 7)
    np.testing.assert_allclose(found.gram(centred=False), np.einsum("rgn,rgm->gnm", rows, rows) / 50, rtol=1e-9)
    np.testing.assert_allclose(found.target(centred=False), np.einsum("rgs,rgn->gsn", targets, rows) / 50, rtol=1e-9)
    assert np.array_equal(found.gram(centred=True), found.cov)
    assert np.array_equal(found.target(centred=True), found.cross)


SINGULAR = {
    "fewer rows than inputs": drawn((2, 40, 3, 10), 0)[0],
    "one row": drawn((1, 8, 3, 1), 0)[0],
    "constant": np.ones((20, 1, 6)),
    "zeros": np.zeros((20, 1, 6)),
    "a dead input": drawn((1, 6, 3, 50), 0)[0] * np.array([1, 1, 0, 1, 1, 1]),
    "two equal inputs": drawn((1, 6, 3, 50), 0)[0][:, :, [0, 0, 1, 2, 3, 4]],
    "scales far apart": drawn((1, 6, 3, 50), 0)[0] * 10.0 ** np.array([-12, -6, 0, 2, 4, 6]),
    "one input": drawn((2, 1, 3, 50), 0)[0],
}


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("name", SINGULAR)
def test_shrunk_is_positive_definite(name: str, centred: bool) -> None:
    rows = SINGULAR[name]
    with np.errstate(all="raise", under="ignore"):
        found = collected(rows, np.zeros((*rows.shape[:2], 0)), 6)
        shrunk = found.shrunk(centred=centred)
    assert (np.linalg.eigvalsh(shrunk) > 0).all()
    np.linalg.cholesky(shrunk)
    assert ((found.spread >= 0) & (found.spread <= 1)).all()
    if np.trace(found.gram(centred=centred)[0]) > 0:
        np.testing.assert_allclose(
            np.trace(shrunk, axis1=1, axis2=2), np.trace(found.gram(centred=centred), axis1=1, axis2=2)
        )


def test_shrinking_vanishes_with_more_rows_and_brings_few_rows_nearer_to_the_truth() -> None:
    rows, targets = drawn((1, 12, 1, 100_000), 3)
    truth = collected(rows, targets, 5000)
    assert truth.spread[0] < 1e-3
    few = [collected(rows[i : i + 10], targets[i : i + 10], 10) for i in range(0, 500, 10)]
    assert min(float(one.spread[0]) for one in few) > 1e-2

    def distance(grams: list[Array]) -> float:
        return float(np.mean([np.linalg.norm(gram - truth.cov) for gram in grams]))

    assert distance([one.shrunk(centred=True) for one in few]) < distance([one.cov for one in few])


def test_rows_that_are_no_numbers_are_left_out() -> None:
    rows, targets = (array.astype(np.float32) for array in drawn((2, 5, 3, 30), 5))
    bad_rows, bad_targets = rows.copy(), targets.copy()
    bad_rows[3, 0, 0], bad_rows[4, 1, 2], bad_targets[17, 1, 1] = np.nan, np.inf, -np.inf
    good = [i for i in range(30) if i not in {3, 4, 17}]
    sums = Accumulator(2, 5, 3)
    sums.add(bad_rows, bad_targets)
    found = sums.moments()
    assert_close(found, collected(rows[good], targets[good], 27), 1e-5)
    again = CrossAccumulator(found)
    again.add(bad_rows, bad_targets)
    np.testing.assert_allclose(again.moments().cross, found.cross, atol=1e-4)


def test_squares_beyond_float32_are_taken_in_float64() -> None:
    rows = drawn((1, 4, 1, 30), 6)[0] * 1e25
    got = collected(rows.astype(np.float32), np.zeros((30, 1, 0), np.float32), 10)
    np.testing.assert_allclose(got.cov, collected(rows, np.zeros((30, 1, 0)), 30).cov, rtol=1e-4)


def test_no_rows_at_all_are_white_noise() -> None:
    sums = Accumulator(2, 5, 3)
    sums.add(np.zeros((0, 2, 5), np.float32), np.zeros((0, 2, 3), np.float32))
    found = sums.moments()
    assert found.count == 0
    assert np.array_equal(found.cov, np.stack([np.eye(5)] * 2))
    assert not found.cross.any()


@settings(deadline=None, max_examples=20)
@given(SIZES, st.integers(0, 99), st.integers(1, 50))
def test_other_outputs_for_known_inputs(sizes: tuple[int, int, int, int], seed: int, block: int) -> None:
    rows, targets = drawn(sizes, seed, 1.0)
    other = np.maximum(targets, 0.5)
    sums = CrossAccumulator(collected(rows, targets, 50))
    for first in range(0, len(rows), block):
        sums.add(rows[first : first + block], other[first : first + block])
    assert_close(sums.moments(), direct(rows, other), 1e-6)
