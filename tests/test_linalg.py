"""Spectra and truncated factors against numpy's SVD in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from onnx_lowrank.linalg import NestedFit, Spectrum, leading_subspace, singular_values, spectrum, whitened_rows

Matrix = NDArray[np.float64]


def decaying(groups: int, rows: int, columns: int, seed: int, condition: float = 1e3) -> Matrix:
    """Random singular vectors, singular values falling geometrically from 1 to 1 / `condition`."""
    rng = np.random.default_rng(seed)
    k = min(rows, columns)
    u = np.linalg.qr(rng.standard_normal((groups, rows, k)))[0]
    v = np.linalg.qr(rng.standard_normal((groups, columns, k)))[0]
    return np.einsum("gmk,k,gnk->gmn", u, np.geomspace(1, 1 / condition, k), v)


def check(matrix: Matrix, cut: Spectrum) -> None:
    """Every truncation is as good as numpy's, and the errors told are those of the product."""
    sigma = np.linalg.svd(matrix, compute_uv=False)
    np.testing.assert_allclose(cut.values, sigma, atol=2e-8 * sigma.max())
    norm = np.linalg.norm(matrix)
    for rank in range(1, sigma.shape[1] + 1):
        a, b = cut.truncated(rank)
        assert a.shape == (*matrix.shape[:2], rank)
        assert b.shape == (matrix.shape[0], rank, matrix.shape[2])
        difference = matrix - a @ b
        assert np.linalg.norm(difference) / norm == pytest.approx(cut.tail(rank), abs=5e-8)
        assert cut.tail(rank) == pytest.approx(np.linalg.norm(sigma[:, rank:]) / norm, abs=5e-8)
        assert np.linalg.norm(difference, 2, axis=(1, 2)).max() / sigma.max() == pytest.approx(
            cut.next_value(rank), abs=5e-8
        )


@given(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12), st.integers(0, 9))
@settings(deadline=None, max_examples=25)
def test_stacks_of_tall_wide_and_square_matrices(groups: int, rows: int, columns: int, seed: int) -> None:
    matrix = decaying(groups, rows, columns, seed)
    cut = spectrum(matrix)
    assert cut.left == (rows <= columns)
    check(matrix, cut)


@pytest.mark.parametrize("shape", [(30, 4), (4, 30)])
def test_near_singular(shape: tuple[int, int]) -> None:
    matrix = decaying(2, *shape, seed=1, condition=1e12)
    cut = spectrum(matrix)
    check(matrix, cut)
    a, b = cut.truncated(min(shape))
    assert np.isfinite(a).all()
    assert np.isfinite(b).all()


def test_full_rank_gives_the_matrix_back_to_rounding_error() -> None:
    matrix = decaying(3, 20, 14, seed=2, condition=1e10)
    a, b = spectrum(matrix).truncated(14)
    assert np.abs(a @ b - matrix).max() < 1e-13


def test_exact_low_rank_has_no_tail() -> None:
    rng = np.random.default_rng(3)
    matrix = rng.standard_normal((1, 15, 3)) @ rng.standard_normal((1, 3, 11))
    assert spectrum(matrix).tail(3) < 1e-7
    assert spectrum(matrix).tail(2) > 1e-2


def test_zero_matrix() -> None:
    cut = spectrum(np.zeros((2, 5, 3)))
    a, b = cut.truncated(2)
    assert (cut.tail(1), cut.next_value(1)) == (0.0, 0.0)
    assert not (a @ b).any()


def test_one_zero_matrix_in_a_stack_is_not_divided_by_zero() -> None:
    matrix = decaying(2, 6, 5, seed=4)
    matrix[1] = 0
    a, b = spectrum(matrix).truncated(3)
    assert not (a[1] @ b[1]).any()
    assert np.isfinite(a).all()
    assert np.isfinite(b).all()


def test_scale_is_shared_by_both_factors() -> None:
    """Half precision has five bits of exponent: neither factor may take all of the weight's scale."""
    matrix = 1e4 * decaying(1, 9, 7, seed=5)
    a, b = spectrum(matrix).truncated(4)
    np.testing.assert_allclose(np.linalg.norm(a[0], axis=0), np.linalg.norm(b[0], axis=1), rtol=1e-8)


def test_float32_input_is_decomposed_in_float64() -> None:
    matrix = decaying(1, 8, 8, seed=6).astype(np.float32)
    cut = spectrum(matrix)
    assert cut.values.dtype == np.float64
    check(matrix.astype(np.float64), cut)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (7, 7)])
def test_leading_subspace(shape: tuple[int, int]) -> None:
    matrix = decaying(1, *shape, seed=7)[0]
    basis, values = leading_subspace(matrix, 3)
    u, sigma, _ = np.linalg.svd(matrix)
    np.testing.assert_allclose(basis.T @ basis, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(basis @ basis.T, u[:, :3] @ u[:, :3].T, atol=1e-8)
    np.testing.assert_allclose(values[: min(shape)], sigma, atol=1e-7)
    assert len(values) == shape[0]


def fails(*_: Matrix) -> tuple[Matrix, Matrix]:
    raise np.linalg.LinAlgError("Eigenvalues did not converge")


def not_finite(matrix: Matrix) -> tuple[Matrix, Matrix]:
    return np.full(matrix.shape[:-1], np.nan), np.full(matrix.shape, np.nan)


def wrong_values(matrix: Matrix) -> tuple[Matrix, Matrix]:
    return np.ones(matrix.shape[:-1]), np.broadcast_to(np.eye(matrix.shape[-1]), matrix.shape)


def wrong_vectors(matrix: Matrix) -> tuple[Matrix, Matrix]:
    return EIGH(matrix)[0], np.broadcast_to(np.eye(matrix.shape[-1]), matrix.shape)


EIGH = np.linalg.eigh


@pytest.mark.parametrize("eigh", [fails, not_finite, wrong_values, wrong_vectors])
@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (7, 7)])
def test_where_the_gram_matrix_fails_the_matrix_itself_is_decomposed(
    eigh: Callable[[Matrix], tuple[Matrix, Matrix]], shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = decaying(2, *shape, seed=8)
    expected = np.linalg.svd(matrix)
    monkeypatch.setattr(np.linalg, "eigh", eigh)
    if eigh is not wrong_vectors:
        monkeypatch.setattr(np.linalg, "eigvalsh", lambda gram: eigh(gram)[0])
    check(matrix, spectrum(matrix))
    np.testing.assert_allclose(singular_values(matrix), expected[1], atol=1e-7)
    basis, values = leading_subspace(matrix[0], 3)
    np.testing.assert_allclose(basis @ basis.T, expected[0][0][:, :3] @ expected[0][0][:, :3].T, atol=1e-7)
    assert len(values) == shape[0]


def moment(size: int, seed: int, condition: float) -> Matrix:
    """A positive definite matrix."""
    half = decaying(1, size, size, seed, math.sqrt(condition))[0]
    return half @ half.T


@given(st.integers(1, 10), st.integers(1, 10), st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_whitened_rows_span_the_best_row_spaces(rows: int, columns: int, seed: int) -> None:
    """Against numpy's SVD of M C with H = C C^T, in the metric H."""
    matrix, covariance = decaying(1, rows, columns, seed)[0], moment(columns, seed + 1, 1e4)
    half, most = np.linalg.cholesky(covariance), min(rows, columns)
    found, values = whitened_rows(matrix, covariance, most)
    sigma = np.linalg.svd(matrix @ half, compute_uv=False)
    np.testing.assert_allclose(values, sigma, atol=1e-7 * sigma[0])
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1)
    for rank in range(1, most + 1):
        span = np.linalg.qr((found[:rank] @ half).T)[0]
        left = (matrix @ half) - (matrix @ half @ span) @ span.T
        assert np.linalg.norm(left) == pytest.approx(np.linalg.norm(sigma[rank:]), abs=1e-6 * sigma[0])


def test_whitened_rows_of_singular_matrices() -> None:
    covariance = np.diag([1.0, 0.0, 2.0, 0.0])
    for rows in (2, 6):
        matrix = np.random.default_rng(0).standard_normal((rows, 4))
        found, values = whitened_rows(matrix, covariance, min(rows, 4))
        assert np.isfinite(found).all()
        assert np.count_nonzero(values > 1e-6) == 2
    assert not whitened_rows(np.zeros((3, 4)), covariance, 3)[0].any()


@given(st.integers(1, 600), st.integers(1, 3), st.integers(0, 9))
@settings(deadline=None, max_examples=8)
def test_nested_fit_solves_every_leading_block(size: int, outputs: int, seed: int) -> None:
    gram, cross = moment(size, seed, 1e3), np.random.default_rng(seed).standard_normal((size, outputs))
    fit = NestedFit(gram, cross)
    explained = np.square(fit.explained).sum(axis=1).cumsum()
    for count in {1, size // 2 + 1, size}:
        best = np.linalg.solve(gram[:count, :count], cross[:count])
        np.testing.assert_allclose(fit.solve(count), best, atol=1e-6 * np.abs(best).max())
        assert explained[count - 1] == pytest.approx(np.vdot(best, cross[:count]), rel=1e-6)


def test_nested_fit_of_dependent_and_dead_features_stays_small() -> None:
    features = np.random.default_rng(1).standard_normal((40, 3))[:, [0, 1, 0, 2, 1]] * [1, 1, 1e6, 0, 1]
    target = features[:, :2] @ [[2.0], [3.0]]
    fit = NestedFit(features.T @ features, features.T @ target)
    solution = fit.solve(5)
    np.testing.assert_allclose(features @ solution, target, atol=1e-4)
    assert np.abs(solution).max() < 10
    assert solution[3] == 0


def test_nested_fit_refuses_what_is_no_second_moment() -> None:
    with pytest.raises(np.linalg.LinAlgError):
        NestedFit(np.array([[1.0, 1e9], [1e9, 1.0]]), np.ones((2, 1)))
