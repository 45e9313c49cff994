"""Spectral norms that rules compare, against numpy's of the arrays that are handed out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from chains import moment
from formats import EVERY
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import conv_layer, planted

from onnx_lowrank.allocators.equal_error import spectral_error
from onnx_lowrank.allocators.minimax import minimax
from onnx_lowrank.candidates import Candidate, Grid, Problem, candidate, keep
from onnx_lowrank.layer import Array, LayerShape, Shape
from onnx_lowrank.row_space import RowSpace, factorized
from onnx_lowrank.search.factorizations import FactorizationCache
from onnx_lowrank.search.table import row_of, with_spectral_errors

THEOREM = {"grouped_svd"}  # ALDS compares a bound, of weights


def numpys(array: Array, gram: Array | None) -> float:
    """The largest spectral norm of the output unfoldings, times a root of the moment."""
    matrices = array.reshape(*array.shape[:2], -1)
    return float(
        np.linalg.norm(matrices if gram is None else matrices @ np.linalg.cholesky(gram), 2, axis=(1, 2)).max()
    )


def drawn(shape: LayerShape, seed: int, *, structured: bool) -> Array:
    """White noise, or most of the energy in one filter and in a few inputs."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(shape.weight)
    if structured:
        weight[:, rng.integers(shape.out)] *= 20.0
        weight *= np.geomspace(1, 0.01, shape.in_).reshape(-1, 1, 1)
    return weight


@pytest.mark.parametrize("name", EVERY)
@settings(deadline=None, max_examples=8)
@given(st.integers(1, 2), st.sampled_from([(3, 3), (1, 3), (2, 3)]), st.booleans(), st.booleans(), st.integers(0, 9))
def test_spectral_errors_are_those_of_the_factors(
    name: str, groups: int, kernel: Shape, structured: bool, calibrated: bool, seed: int
) -> None:
    shape, method = LayerShape(groups, 8, 12, kernel), EVERY[name]
    if method.refusal(shape) is not None or (calibrated and name in THEOREM):
        return
    weight, gram = drawn(shape, seed, structured=structured), moment(shape, 1e2, seed) if calibrated else None
    made, ranks = method.factorize(weight, gram), method.ranks(shape, 1)
    options = [candidate(conv_layer("l", weight), method, made, rank, 1) for rank in ranks[:: len(ranks) // 3 or 1]]
    for found in with_spectral_errors(options, {name: made}, weight, gram):
        cut = weight - method.chain(shape, found.rank).dense(made.factors(found.rank))
        true = numpys(cut, gram) / numpys(weight, gram)
        if name in THEOREM:
            assert true <= spectral_error(found) + 1e-6
        else:
            assert spectral_error(found) == pytest.approx(true, abs=1e-5)


def test_spectral_errors_in_the_row_space() -> None:
    shape = LayerShape(1, 6, 20)
    weight = np.random.default_rng(0).standard_normal(shape.weight)
    gram, space, method = moment(shape, 1e2), RowSpace.of(weight), EVERY["svd"]
    seen = space.seen(np.linalg.cholesky(gram[0]).T[:, None])
    inside = factorized(method, weight, np.einsum("rgn,rgm->gnm", seen, seen))
    for rank in (1, 3):
        cut = weight - method.chain(shape, (rank,)).dense(inside.factors((rank,)))
        assert inside.spectral_error((rank,)) == pytest.approx(numpys(cut, gram) / numpys(weight, gram), abs=1e-6)


def test_a_layer_of_zeros_loses_nothing() -> None:
    weight, method = np.zeros((1, 8, 8, 3, 3)), EVERY["tucker2"]
    fit = method.factorize(weight)
    options = [candidate(conv_layer("l", weight), method, fit, (2, 2), 1)]
    (found,) = with_spectral_errors(options, {"tucker2": fit}, weight)
    assert found.spectral_error == 0.0


@pytest.mark.parametrize("spectral", [False, True])
def test_they_are_measured_where_the_rule_compares_them(spectral: bool, tmp_path: Path) -> None:
    layer = conv_layer("l", planted(LayerShape(1, 16, 12, (3, 3)), 4, 0.2, 0))
    cache = FactorizationCache(1 << 30, tmp_path)
    row = row_of(layer, [EVERY["svd"], EVERY["tucker2"]], Grid.of_machine(4), cache, spectral=spectral)
    assert all((option.spectral_error is not None) == spectral for option in row.options[1:])


def test_minimax_compares_all_formats_by_one_measure() -> None:
    """Bounds by the Frobenius norm made every format but svd worse than no layer at all."""
    shape, rows = LayerShape(1, 32, 24, (3, 3)), list[tuple[Candidate, ...]]()
    for i in range(2):
        weight = planted(shape, 5 + 3 * i, 0.15, i)
        layer = conv_layer(f"l{i}", weight)
        made = {name: EVERY[name].factorize(weight) for name in ("svd", "tucker2", "spatial_svd")}
        options = [candidate(layer, EVERY[n], fit, r, 1) for n, fit in made.items() for r in EVERY[n].ranks(shape, 8)]
        rows.append((keep(layer), *with_spectral_errors(options, made, weight)))
    whole = sum(row[0].macs for row in rows)
    chosen = minimax(Problem(tuple(rows), "macs", 0.3 * whole))
    assert max(map(spectral_error, chosen)) < 1
    assert {c.method for c in chosen} != {"svd"}
