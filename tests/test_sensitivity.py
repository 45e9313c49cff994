"""Loss curves: through their probes, never falling, of second order beyond them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import softmax

from onnx_lowrank.sensitivity import PROBES, RUIN, SMALLEST, LossCurve, output_loss, probe_at

ERRORS = st.floats(1e-6, 1.0)
POINTS = st.lists(st.tuples(ERRORS, st.floats(1e-9, 10.0)), min_size=1, max_size=8, unique_by=lambda p: p[0])


@settings(deadline=None)
@given(POINTS, st.lists(st.floats(0, 2.0), min_size=2, max_size=20))
def test_a_larger_error_never_loses_less(points: list[tuple[float, float]], errors: list[float]) -> None:
    curve = LossCurve.through(points)
    losses = [curve.loss(error) for error in sorted(errors)]
    assert all(b >= a * (1 - 1e-9) for a, b in itertools.pairwise(losses))
    assert all(math.isfinite(loss) and loss >= 0 for loss in losses)


@settings(deadline=None)
@given(POINTS)
def test_the_curve_goes_through_its_probes_and_above_noise(points: list[tuple[float, float]]) -> None:
    curve, highest = LossCurve.through(points), 0.0
    for error, loss in sorted(points):
        highest = max(highest, loss, SMALLEST)
        assert curve.loss(error) == pytest.approx(highest, rel=1e-6)


@settings(deadline=None)
@given(st.floats(1e-4, 1e-1), st.floats(2.0, 9.0), st.floats(1e-6, 1e-2), st.floats(1.0, 50.0), st.floats(0, 1))
def test_between_probes_it_is_a_power_law(low: float, wide: float, loss: float, rise: float, at: float) -> None:
    curve = LossCurve.through([(low, loss), (low * wide, loss * rise)])
    assert curve.loss(low * wide**at) == pytest.approx(loss * rise**at, rel=1e-5)


def test_the_ends_are_of_second_order() -> None:
    curve = LossCurve.through([(0.1, 0.02), (0.2, 0.05)])
    assert curve.loss(0.05) == pytest.approx(0.005)
    assert curve.loss(0.4) == pytest.approx(0.2)
    assert curve.loss(0.0) == 0.0
    assert LossCurve.through([]).loss(0.3) == pytest.approx(0.09)
    assert LossCurve.through([(0.0, 5.0)]) == LossCurve((), ())
    assert LossCurve.through([(0.1, 0.0)]).losses == (SMALLEST,)


@settings(deadline=None)
@given(st.lists(st.one_of(st.just(0.0), ERRORS), max_size=40), st.integers(1, 6))
def test_probes_are_few_spread_and_include_the_ends(errors: list[float], count: int) -> None:
    at, usable = probe_at(errors, count), [e for e in errors if e > 0]
    assert at == sorted(set(at))
    assert all(errors[i] > 0 for i in at)
    assert len(at) <= max(count, 0)
    if usable and count > 1:
        chosen = [errors[i] for i in at]
        assert (min(chosen), max(chosen)) == pytest.approx((min(usable), max(usable)))


def test_probes_are_even_in_the_logarithm() -> None:
    errors = list(np.geomspace(1e-3, 1.0, 31))
    assert probe_at(errors) == [0, 10, 20, 30]
    assert len(probe_at(errors)) == PROBES
    assert probe_at([0.0, 0.0]) == []


def test_losses_of_outputs() -> None:
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(5), 6)
    q = rng.dirichlet(np.ones(5), 6)
    expected = float(np.log(q / p).var(axis=1).mean() / 2)
    batches = [({"p": p[i : i + 2]}, {"p": q[i : i + 2]}, 2) for i in (0, 2, 4)]
    assert output_loss(batches) == pytest.approx(expected)
    y = rng.standard_normal((6, 4, 4))
    assert output_loss([({"y": y}, {"y": 1.1 * y}, 6)]) == pytest.approx(0.01)
    assert output_loss([({"p": p, "y": y}, {"p": q, "y": 1.1 * y}, 6)]) == pytest.approx(expected + 0.01)
    assert output_loss([({"y": y}, {"y": y}, 6)]) == 0.0


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_network_loses_the_same_with_its_softmax_and_without(dtype: type[np.floating]) -> None:
    rng = np.random.default_rng(1)
    wide = 1 if dtype is np.float16 else 10  # in half precision few probabilities are told apart
    logits = wide * rng.standard_normal((6, 50, 40))
    other = logits + 0.5 * rng.standard_normal(logits.shape)
    p, q = (softmax(rows, axis=-1).astype(dtype) for rows in (logits, other))
    bare = output_loss([({"logits": logits}, {"logits": other + 5.0}, 6)])
    assert output_loss([({"p": p}, {"p": q}, 6)]) == pytest.approx(bare, rel=0.03 if dtype is np.float16 else 1e-4)
    assert bare == pytest.approx(0.5**2 / 2 * 39 / 40, rel=0.05)


@pytest.mark.parametrize("mask", [-math.inf, -1e9, float(np.finfo(np.float32).min)])
def test_masked_classes_count_nothing(mask: float) -> None:
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((6, 10)).astype(np.float32)
    error = rng.standard_normal((6, 10)).astype(np.float32)
    masked, moved = logits.copy(), logits + error
    masked[:, 7:], moved[:, 7:] = mask, mask
    expected = output_loss([({"logits": logits[:, :7]}, {"logits": (logits + error)[:, :7]}, 6)])
    assert output_loss([({"logits": masked}, {"logits": moved}, 6)]) == pytest.approx(expected)


def test_a_distribution_that_tells_nothing_is_no_ruin() -> None:
    p = np.full((4, 3), 1 / 3, np.float32)
    q = p.copy()
    q[0, 0] = np.nextafter(q[0, 0], np.float32(1))
    assert output_loss([({"p": p}, {"p": q}, 4)]) < 1e-12


def test_classes_that_never_occur_may_come_up() -> None:
    p, q = np.zeros((4, 100)), np.full((4, 100), 1e-6)
    p[:, :2], q[:, :2] = 0.5, 0.5
    assert output_loss([({"p": p}, {"p": q}, 4)]) < 1e-12


def test_what_was_no_number_before_counts_nothing() -> None:
    logits = np.random.default_rng(4).standard_normal((6, 10))
    broken = logits.copy()
    broken[0, 0] = np.nan
    assert output_loss([({"logits": broken}, {"logits": logits}, 6)]) == 0.0


def test_losses_add_up_where_some_positions_are_undecided() -> None:
    """Independent errors of ten layers; one position in fifty hangs between the classes, and every error moves it."""
    rng = np.random.default_rng(2)
    undecided = rng.random((400, 40)) < 0.02
    logits = np.zeros((400, 40, 3))
    logits[..., 0] = np.where(undecided, 0.0, 12.0)
    errors = rng.standard_normal((10, *logits.shape)) * np.where(undecided, 2.0, 0.3)[..., None]
    alone = [lost(logits, error) for error in errors]
    assert lost(logits, errors.sum(axis=0)) == pytest.approx(sum(alone), rel=0.1)


def lost(logits: NDArray[np.float64], error: NDArray[np.float64]) -> float:
    before, after = softmax(logits, axis=-1), softmax(logits + error, axis=-1)
    return output_loss([({"p": before}, {"p": after}, len(logits))])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_gives_no_numbers_is_ruined(bad: float) -> None:
    y = np.ones((3, 4, 2))
    other = y.copy()
    other[1, 2, 0] = bad
    assert output_loss([({"y": y}, {"y": other}, 3)]) == RUIN
    assert output_loss([({"y": other}, {"y": y}, 3)]) == 0.0  # the original's own
    assert math.isfinite(LossCurve.through([(0.1, 1e-3), (0.9, RUIN)]).loss(0.95))


def test_a_loss_counts_outputs_of_another_shape_and_ends_at_ruin() -> None:
    p = np.random.default_rng(0).dirichlet(np.ones(5), 6)
    assert output_loss([({"p": p}, {"p": p}, 6), ({"p": p}, {"p": p[:3]}, 6)]) == pytest.approx(0.5)
    zero = np.zeros((6, 4, 4))
    assert output_loss([({"y": zero}, {"y": zero + 1}, 6)]) == RUIN
