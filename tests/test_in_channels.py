"""Fits that go on in the metric of the input channels before samples have their say."""

from __future__ import annotations

import pickle
from collections.abc import Sequence

import numpy as np
import pytest
from chains import moment
from formats import METHODS

from onnx_lowrank.decomposition import Rank
from onnx_lowrank.layer import Array, LayerShape, Shape
from onnx_lowrank.passes.decompose import block_term, cp, mixing
from onnx_lowrank.passes.decompose.fitted import Fitted
from onnx_lowrank.passes.decompose.mixing import MixingFit
from onnx_lowrank.passes.decompose.whitened import Channels

RANKS: dict[str, Rank] = {"cp": (6,), "cp_spatial": (6,), "block_term": (2, 3, 4)}
FITS: tuple[type[MixingFit], ...] = (cp.CpFit, block_term.BlockFit)
every_fit = pytest.mark.parametrize(("name", "rank"), RANKS.items())


def problem(seed: int = 3) -> tuple[LayerShape, Array, Array]:
    """A weight, and the second moment of channels whose energies range over six decades, the taps alike."""
    shape = LayerShape(2, 12, 10, (3, 3))
    weight = np.random.default_rng(seed).standard_normal(shape.weight)
    channels = moment(LayerShape(2, 12, 10), 1e6)
    return shape, weight, np.stack([np.kron(each, np.eye(9) + 0.5) for each in channels])


def test_roots_are_those_of_the_mean_over_the_taps() -> None:
    shape, weight, gram = problem()
    found = Channels(weight, gram)
    for root, matrix in zip(found.roots, gram, strict=True):
        mean = np.mean([matrix[tap::9, tap::9] for tap in range(9)], axis=0)
        floor = 1e-3 * np.trace(mean) / shape.in_
        np.testing.assert_allclose(root @ root.T, mean + floor * np.eye(shape.in_), rtol=1e-9, atol=1e-9 * floor)
    np.testing.assert_allclose(found.weight, np.einsum("gsckl,gcd->gsdkl", weight, found.roots), rtol=1e-9, atol=1e-12)


def test_a_group_without_inputs_has_a_root() -> None:
    _, weight, gram = problem()
    gram[1] = 0
    np.testing.assert_allclose(Channels(weight, gram).roots[1], np.eye(10), rtol=1e-9)


def test_a_moment_that_is_not_quite_one_has_a_root() -> None:
    _, weight, gram = problem()
    gram[0][np.diag_indices(9)] -= 0.02
    assert np.isfinite(Channels(weight, gram).roots).all()


@every_fit
@pytest.mark.parametrize("kernel", [(5,), (3, 2), (2, 3, 2)], ids=str)
def test_without_a_sweep_nothing_changes(name: str, rank: Rank, kernel: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    """There and back again."""
    monkeypatch.setattr(cp, "IN_CHANNELS", 0)
    monkeypatch.setattr(block_term, "IN_CHANNELS", 0)
    shape = LayerShape(2, 12, 10, kernel)
    if METHODS[name].refusal(shape) is not None:
        pytest.skip(f"{name} takes no such kernel")
    weight = np.random.default_rng(1).standard_normal(shape.weight)
    chain, made = METHODS[name].chain(shape, rank), METHODS[name].factorize(weight)
    assert isinstance(made, MixingFit)
    before = made.factors(rank)
    after = made.in_channels(rank, before, Channels(weight, moment(shape, 1e4)))
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
    leave_out(monkeypatch)
    ratios = [ours / error(seed) for ours, seed in zip(gone_on, seeds, strict=True)]
    assert np.exp(np.mean(np.log(ratios))) < 0.92


@every_fit
def test_it_does_no_harm(name: str, rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    """Energies that are rough per channel and tap, where the one sweep after it can turn the order round."""

    def error(seed: int) -> float:
        rng = np.random.default_rng(seed)
        rows = rng.standard_normal((200, 90)) * np.exp(2 * rng.standard_normal(90))
        weight = rng.standard_normal((1, 12, 10, 3, 3))
        return METHODS[name].factorize(weight, (rows.T @ rows / 200)[None]).error(rank)

    seeds = range(12)
    gone_on = [error(seed) for seed in seeds]
    leave_out(monkeypatch)
    assert all(ours <= (1 + 1e-9) * error(seed) for ours, seed in zip(gone_on, seeds, strict=True))


@every_fit
def test_groups_without_weights(name: str, rank: Rank) -> None:
    shape, weight, gram = problem()
    weight[1] = 0
    made = METHODS[name].factorize(weight, gram)
    dense = METHODS[name].chain(shape, rank).dense(made.factors(rank))
    assert made.error(rank) < 1
    assert not dense[1].any()


@every_fit
@pytest.mark.parametrize("refuse", [False, True], ids=["explain nothing", "refused"])
def test_bad_features_are_not_taken(name: str, rank: Rank, refuse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither those that explain less nor those that may not be used."""
    made_in = {fit: fit.in_channels for fit in FITS}
    usable = {fit: fit.usable for fit in FITS}
    marked: list[Array] = []

    def spoilt(fit: MixingFit, rank: Rank, factors: Sequence[Array], channels: Channels) -> tuple[Array, ...]:
        found = made_in[type(fit)](fit, rank, factors, channels)
        marked.append(found[0])
        return found if refuse else tuple(np.zeros_like(factor) for factor in found)

    def refused(fit: MixingFit, rank: Rank, factors: Sequence[Array]) -> bool:
        ratios = [factors[0] / each for each in marked if refuse and each.shape == factors[0].shape]
        return not any(np.allclose(ratio, ratio.flat[0]) for ratio in ratios) and usable[type(fit)](fit, rank, factors)

    _, weight, gram = problem()
    for fit in FITS:
        monkeypatch.setattr(fit, "in_channels", spoilt)
        monkeypatch.setattr(fit, "usable", refused)
    ours = METHODS[name].factorize(weight, gram).error(rank)
    leave_out(monkeypatch)
    assert marked
    assert METHODS[name].factorize(weight, gram).error(rank) == ours


def test_what_can_be_made_again_is_not_kept() -> None:
    """A factorization that is written to the disk takes the channels' metric along no more than its moments' roots."""
    _, weight, gram = problem()
    made = METHODS["cp"].factorize(weight, gram)
    before = len(pickle.dumps(made))
    made.error((4,))
    terms = sum(factor.nbytes for factor in made.factors((4,)))
    assert len(pickle.dumps(made)) < before + weight.nbytes / 2 + 8 * terms
    assert pickle.loads(pickle.dumps(made)).error((6,)) == METHODS["cp"].factorize(weight, gram).error((6,))


def test_formats_without_pay_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _, weight, gram = problem()
    monkeypatch.delattr(mixing, "Channels")
    assert METHODS["tensor_train"].factorize(weight, gram).error((4, 4, 4)) < 1


def leave_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for fit in FITS:
        monkeypatch.setattr(fit, "_calibrated", Fitted._calibrated)
