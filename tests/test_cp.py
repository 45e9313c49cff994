"""CP: least squares against TensorLy, and the correction on tensors that have no best approximation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import conv_layer
from tensorly.cp_tensor import cp_to_tensor
from tensorly.decomposition import parafac

from onnx_lowrank.candidates import candidate, keep
from onnx_lowrank.layer import Array, LayerShape, Shape
from onnx_lowrank.passes.decompose.cp import RIDGE, Cp, CpFit
from onnx_lowrank.passes.decompose.cp_als import Problem, Terms, exact_terms
from onnx_lowrank.report.build import layer_rows
from onnx_lowrank.search.table import Row


def degenerate(size: int, seed: int) -> Array:
    """a a b + a b a + b a a: rank 3, but a limit of rank-2 tensors whose two terms cancel."""
    basis = np.linalg.qr(np.random.default_rng(seed).standard_normal((3, size, 2)))[0]
    (a, x), (b, y), (c, z) = (pair.T for pair in basis)
    return np.sum([np.einsum("i,j,k->ijk", *terms) for terms in ((a, b, z), (a, y, c), (x, b, c))], axis=0)


@settings(deadline=None, max_examples=6)
@given(st.sampled_from([(8, 6, 5), (7, 6, 3, 3)]), st.integers(1, 3), st.integers(0, 99))
def test_planted_terms_are_found(shape: Shape, rank: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    planted = Terms(rng.uniform(0.5, 2, rank), tuple(np.linalg.qr(rng.standard_normal((n, rank)))[0] for n in shape))
    problem = Problem(planted.dense())
    found = problem.als([problem.spectral(rank, rng), *(problem.random(rank, rng) for _ in range(3))], 100, 1e-6)
    assert problem.error(found) < 1e-3
    np.testing.assert_allclose(np.sort(found.weights), np.sort(planted.weights), rtol=1e-2)


@pytest.mark.parametrize("shape", [(12, 10, 9), (8, 6, 3, 3)])
@pytest.mark.parametrize("rank", [2, 8, 14])
def test_as_good_as_tensorly(shape: Shape, rank: int) -> None:
    tensor, rng = np.random.default_rng(1).standard_normal(shape), np.random.default_rng(2)
    problem = Problem(tensor)
    ours = problem.als([problem.spectral(rank, rng), *(problem.random(rank, rng) for _ in range(3))], 300, 1e-7)
    theirs = cp_to_tensor(parafac(tensor, rank, n_iter_max=300, init="random", random_state=0, tol=1e-8))
    assert problem.error(ours) <= 1.03 * np.linalg.norm(tensor - theirs) / np.linalg.norm(tensor)


@pytest.mark.parametrize("seed", [0, 2, 3])
def test_the_correction_undoes_what_cancels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    problem = Problem(degenerate(6, seed) + 0.05 * rng.standard_normal((6, 6, 6)))
    plain = problem.als([problem.random(2, rng) for _ in range(3)], 600, 1e-10)
    assert problem.degeneracy(plain) > 5
    better = problem.corrected(plain, 0.01, 0.0)
    assert problem.error(better) <= 1.01 * problem.error(plain) * (1 + 1e-6)
    assert problem.degeneracy(better) < problem.degeneracy(plain) / 3


@settings(deadline=None, max_examples=5)
@given(st.integers(1, 12), st.integers(0, 99), st.floats(0, 0.3))
def test_the_correction_keeps_to_its_bound(rank: int, seed: int, slack: float) -> None:
    rng = np.random.default_rng(seed)
    problem = Problem(rng.standard_normal((7, 6, 5)))
    plain = problem.als([problem.random(rank, rng)], 20)
    better = problem.corrected(plain, slack, 0.0)
    assert problem.error(better) <= (1 + slack) * problem.error(plain) * (1 + 1e-6) + 1e-6
    assert better.energy <= plain.energy * (1 + 1e-9)


@pytest.mark.parametrize("shape", [(4, 3, 9), (2, 5, 3), (3, 4, 2, 3)])
def test_one_term_per_fibre_is_exact(shape: Shape) -> None:
    tensor = np.random.default_rng(0).standard_normal(shape)
    terms = exact_terms(tensor)
    assert len(terms.weights) == tensor.size // max(shape)
    np.testing.assert_allclose(terms.dense(), tensor, atol=1e-12)
    assert terms.energy == pytest.approx(np.vdot(tensor, tensor))


def test_terms_that_cancel_are_not_usable() -> None:
    weight = np.random.default_rng(0).standard_normal((1, 6, 5, 3, 3))
    made = CpFit(Cp(), weight, None)
    first, middle, last = made.factors((4,))
    assert made.usable((4,), (first, middle, last))
    assert not made.usable((4,), (first, middle * 100, last))


@pytest.mark.parametrize("block", [1, 8, 16])
@pytest.mark.parametrize(
    "shape",
    [
        LayerShape(1, 64, 48, (3, 3)),
        LayerShape(2, 20, 12, (5, 1)),
        LayerShape(1, 3, 2, (2,)),
        LayerShape(1, 512, 256, (3, 3)),
    ],
)
def test_ranks_end_at_half_of_the_weights(shape: LayerShape, block: int) -> None:
    method = Cp()
    shares = [method.chain(shape, rank).params / shape.params for rank in method.ranks(shape, block)]
    assert shares
    assert max(shares) <= 0.5 or len(shares) == 1
    if shape.out == 512:
        ranks = [rank for (rank,) in method.ranks(shape, block)]
        assert ranks == [16, 24, 32, 48, 64, 96, 128, 192, 256, 384] if block < 16 else [16, 32, 48, 64, 96, 128, 192]
        assert max(shares) <= 1 / 3


def test_layers_that_take_minutes_to_fit_are_refused_unless_asked_for() -> None:
    wide = LayerShape(2, 1024, 512, (3, 3))
    assert Cp().refusal(wide) == (
        f"{wide} has 4718592 weights: it takes minutes to fit, unless cp{{largest=4718592}} asks for it"
    )
    assert Cp(largest=4718592).refusal(wide) is None
    assert Cp().refusal(LayerShape(1, 512, 512, (3, 3))) is None


def test_a_small_ridge_holds_back_terms_that_cancel() -> None:
    rng = np.random.default_rng(0)
    problem = Problem(degenerate(6, 0) + 0.05 * rng.standard_normal((6, 6, 6)))
    start = [problem.random(2, rng) for _ in range(3)]
    plain, held = (problem.als(start, 600, 1e-10, ridge) for ridge in (0.0, RIDGE))
    assert problem.degeneracy(plain) > 5
    assert problem.degeneracy(held) < problem.degeneracy(plain) / 2
    assert problem.error(held) < 1.02 * problem.error(plain)


def test_large_tensors_are_multiplied_in_float32() -> None:
    """To errors as good as in float64."""
    rng = np.random.default_rng(3)
    planted = Terms(np.ones(6), tuple(rng.standard_normal((n, 6)) for n in (80, 60, 9)))
    tensor = planted.dense() + 0.1 * rng.standard_normal((80, 60, 9))
    single, double = Problem(tensor), Problem(tensor[:60, :55])  # above and below the limit
    assert (single._turned[0].dtype, double._turned[0].dtype) == (np.float32, np.float64)
    for problem in (single, double):
        found = problem.als([problem.spectral(6, np.random.default_rng(1))], 60, 1e-7)
        assert all(factor.dtype == np.float64 for factor in found.factors)
        residual = np.linalg.norm(problem.tensor - found.dense())
        assert residual < 0.1 * np.sqrt(problem.tensor.size)  # what was added, less what the terms took up


def test_one_rank_alone_is_as_good_as_among_all() -> None:
    shape = LayerShape(1, 12, 10, (3, 3))
    rng = np.random.default_rng(5)
    weight, root = rng.standard_normal(shape.weight), rng.standard_normal((shape.inputs, shape.inputs))
    gram = (root @ root.T)[None]
    alone, among = Cp().factorize(weight, gram, most=(9,)), Cp().factorize(weight, gram)
    assert alone.error((9,)) == among.error((9,))
    assert all(np.array_equal(a, b) for a, b in zip(alone.factors((9,)), among.factors((9,)), strict=True))


def test_one_rank_alone_does_not_degenerate() -> None:
    """Moments of fewer samples than inputs let terms grow: a lower rank is handed out."""
    shape, rng = LayerShape(1, 16, 12, (3, 3)), np.random.default_rng(2)
    weight, rows = rng.standard_normal(shape.weight), rng.standard_normal((20, shape.inputs))
    gram = (rows.T @ rows / 20 + 1e-5 * np.eye(shape.inputs))[None]
    made = CpFit(Cp(), weight, gram, (24,))
    assert made.usable((24,), made.factors((24,)))


def test_a_dead_group_stays_dead() -> None:
    weight = np.random.default_rng(0).standard_normal((2, 8, 8, 3, 3))
    weight[1] = 0
    method, shape = Cp(), LayerShape(2, 8, 8, (3, 3))
    made = method.factorize(weight)
    for rank in (1, 4, 8):
        dense = method.chain(shape, (rank,)).dense(made.factors((rank,)))
        assert not dense[1].any()
        assert made.error((rank,)) < 1
    none = method.factorize(np.zeros((1, 6, 5, 3, 3)), np.eye(45)[None], most=(4,))
    assert not any(factor.any() for factor in none.factors((4,)))


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_sizes_do_not_matter_and_what_is_exact_is_found(size: float) -> None:
    """In float32, too."""
    rng = np.random.default_rng(6)
    terms = Terms(np.full(3, size), tuple(np.linalg.qr(rng.standard_normal((n, 3)))[0] for n in (80, 60, 9)))
    weight = terms.dense().reshape(1, 80, 60, 3, 3)
    made = Cp().factorize(weight)
    assert made.error((3,)) < 1e-4
    assert made.error((1,)) == pytest.approx(np.sqrt(2 / 3), rel=1e-2)


@pytest.mark.parametrize("calibrated", [False, True])
def test_what_a_rank_gets_depends_on_nothing_asked_before(calibrated: bool) -> None:
    shape = LayerShape(1, 12, 10, (3, 3))
    rng = np.random.default_rng(5)
    weight, root = rng.standard_normal(shape.weight), rng.standard_normal((shape.inputs, shape.inputs))
    gram = (root @ root.T)[None] if calibrated else None
    alone, after = (Cp().factorize(weight, gram) for _ in range(2))
    for rank in (2, 9, 5, 14, 7):
        after.error((rank,))
    for rank in (11, 14):
        assert alone.error((rank,)) == after.error((rank,))
        assert all(np.array_equal(a, b) for a, b in zip(alone.factors((rank,)), after.factors((rank,)), strict=True))


@pytest.mark.parametrize("calibrated", [False, True])
def test_the_exact_rank_takes_no_fit(calibrated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    method, shape = Cp(), LayerShape(1, 16, 12, (3, 3))
    weight = np.random.default_rng(0).standard_normal(shape.weight)
    monkeypatch.setattr(CpFit, "fit", lambda *_: pytest.fail("fitted"))
    made, exact = method.factorize(weight, np.eye(shape.inputs)[None] if calibrated else None), method.exact_rank(shape)
    assert made.error(exact) == 0.0
    np.testing.assert_allclose(method.chain(shape, exact).dense(made.factors(exact)), weight, atol=1e-12)


def test_the_report_says_how_far_its_terms_cancel() -> None:
    layer = conv_layer("l", np.random.default_rng(0).standard_normal((1, 12, 10, 3, 3)))
    made, method, weight = Cp().factorize(layer.read()), Cp(), layer.read()
    factors = [factor.reshape(8, -1) for factor in made.factors((8,))[:2]] + [made.factors((8,))[2].reshape(12, 8).T]
    terms = np.prod([np.square(factor).sum(axis=1) for factor in factors], axis=0).sum() / np.vdot(weight, weight)
    found, note = candidate(layer, method, made, (8,), 1), f"terms of {terms:.1f} ||W||^2"
    assert found.note == note
    rows, names = [Row(layer, (keep(layer), found), {})], {"l": "l"}
    (told,) = layer_rows(rows, (), (found,), names, by_time=False, source="measured")
    assert told.reason.endswith(f", weight error {found.error:.3g}, {note}")
    nothing = conv_layer("l", np.zeros((1, 12, 10, 3, 3)))
    assert candidate(nothing, method, method.factorize(nothing.read()), (8,), 1).note == ""
