"""Fits that go on in the metric of the input channels before samples have their say."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from chains import moment
from formats import METHODS

from onnx_lowrank.decomposition import Rank
from onnx_lowrank.layer import Array, LayerShape
from onnx_lowrank.passes.decompose import block_term, cp
from onnx_lowrank.passes.decompose.fitted import Fitted
from onnx_lowrank.passes.decompose.whitened import channel_roots

RANKS: dict[str, Rank] = {"cp": (6,), "cp_spatial": (6,), "block_term": (2, 3, 4)}
every_fit = pytest.mark.parametrize(("name", "rank"), RANKS.items())


def problem(seed: int = 3) -> tuple[LayerShape, Array, Array]:
    """A weight, and the second moment of channels whose energies range over six decades, the taps alike."""
    shape = LayerShape(2, 12, 10, (3, 3))
    weight = np.random.default_rng(seed).standard_normal(shape.weight)
    channels = moment(LayerShape(2, 12, 10), 1e6)
    return shape, weight, np.stack([np.kron(each, np.eye(9) + 0.5) for each in channels])


def test_roots_are_those_of_the_mean_over_the_taps() -> None:
    shape, _, gram = problem()
    roots = channel_roots(gram, shape.in_)
    for root, matrix in zip(roots, gram, strict=True):
        mean = np.mean([matrix[tap::9, tap::9] for tap in range(9)], axis=0)
        floor = 1e-3 * np.trace(mean) / shape.in_
        np.testing.assert_allclose(root @ root.T, mean + floor * np.eye(shape.in_), rtol=1e-9, atol=1e-9 * floor)


def test_a_group_without_inputs_has_a_root() -> None:
    shape, _, gram = problem()
    gram[1] = 0
    np.testing.assert_array_equal(channel_roots(gram, shape.in_)[1], np.eye(shape.in_))


@every_fit
def test_without_a_sweep_nothing_changes(name: str, rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    """There and back again."""
    monkeypatch.setattr(cp, "IN_CHANNELS", 0)
    monkeypatch.setattr(block_term, "IN_CHANNELS", 0)
    shape, weight, gram = problem()
    chain, made = METHODS[name].chain(shape, rank), METHODS[name].factorize(weight)
    assert isinstance(made, Fitted)
    before = made.factors(rank)
    after = made.in_channels(rank, before, channel_roots(gram, shape.in_))
    assert after is not None
    assert [factor.shape for factor in after] == [stage.weight for stage in chain.stages]
    np.testing.assert_allclose(chain.dense(after), chain.dense(before), atol=1e-10)


@every_fit
def test_channels_count_by_their_energy(name: str, rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data-free features with a last stage and one sweep on the samples are a tenth worse on average."""

    def error(seed: int) -> float:
        _, weight, gram = problem(seed)
        return METHODS[name].factorize(weight, gram).error(rank)

    seeds = range(5)
    gone_on = [error(seed) for seed in seeds]
    replace_in_channels(monkeypatch, Fitted.in_channels)
    ratios = [ours / error(seed) for ours, seed in zip(gone_on, seeds, strict=True)]
    assert np.exp(np.mean(np.log(ratios))) < 0.92


@every_fit
def test_features_that_explain_less_are_not_taken(name: str, rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt(fit: Fitted, rank: Rank, factors: Sequence[Array], roots: Array) -> tuple[Array, ...]:
        return tuple(np.zeros_like(factor) for factor in factors)

    _, weight, gram = problem()
    replace_in_channels(monkeypatch, Fitted.in_channels)
    without = METHODS[name].factorize(weight, gram).error(rank)
    replace_in_channels(monkeypatch, spoilt)
    assert METHODS[name].factorize(weight, gram).error(rank) == without


def replace_in_channels(monkeypatch: pytest.MonkeyPatch, other: Callable[..., tuple[Array, ...] | None]) -> None:
    for fit in (cp.CpFit, block_term.BlockFit):
        monkeypatch.setattr(fit, "in_channels", other)
