"""Decompositions of third parties are judged by the same error as the formats beside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from example_plugin.lowrank_decoupling import Decoupling
from output_error import output_error
from tables import conv_layer

from onnx_lowrank.candidates import Grid
from onnx_lowrank.errors import PassError
from onnx_lowrank.layer import Array, LayerShape
from onnx_lowrank.passes.decompose import decompositions
from onnx_lowrank.search.factorizations import FactorizationCache
from onnx_lowrank.search.table import row_of
from onnx_lowrank.third_party import ThirdParty

SVD = decompositions()["svd"]
SHAPE = LayerShape(1, 12, 8, (3, 3))


def correlated(shape: LayerShape) -> tuple[Array, Array]:
    """Inputs of falling strength, and weights that make up for it, as batch normalization leaves them."""
    rng, strengths = np.random.default_rng(0), np.geomspace(1, 1e-2, shape.in_)[:, None]
    weight = rng.standard_normal(shape.weight) / strengths[..., None]
    rows = (rng.standard_normal((4000, shape.in_, 9)) * strengths).reshape(4000, -1)
    return weight.astype(np.float32), (rows.T @ rows / len(rows))[None]


def test_in_a_calibrated_row_errors_are_those_of_the_outputs(tmp_path: Path) -> None:
    """One that ignores the samples stands beside svd by what its arrays do, and displaces nothing that is better."""
    shape = LayerShape(1, 32, 32, (3, 3))
    weight, gram = correlated(shape)
    methods = {method.name: method for method in (SVD, ThirdParty(Decoupling()))}
    cache, grid = FactorizationCache(1 << 30, tmp_path), Grid.of_size(shape, 8)
    layer = conv_layer("layer", weight)
    row = row_of(layer, list(methods.values()), grid, cache, gram=gram)
    assert {one.method for one in row.options[1:]} == set(methods)
    for one in row.options[1:]:
        assert one.chain is not None
        dense = one.chain.dense(cache["layer", one.method].factors(one.rank))
        assert one.error == pytest.approx(output_error(weight, dense, gram), rel=1e-3)
        assert one.error >= output_error(weight, dense, gram) * (1 - 1e-6)
    alone = row_of(layer, [SVD], grid, FactorizationCache(1 << 30, tmp_path), gram=gram)
    assert [one for one in row.options if one.method == "svd"] == list(alone.options[1:])


def test_samples_lower_the_error_of_a_method_that_ignores_them() -> None:
    weight, gram = correlated(SHAPE)
    method = Decoupling()
    free, made = method.factorize(weight), ThirdParty(method).factorize(weight, gram)
    errors: list[float] = []
    for rank in method.ranks(SHAPE, 8):
        plain = output_error(weight, method.chain(SHAPE, rank).dense(free.factors(rank)), gram)
        errors.append(made.error(rank))
        assert errors[-1] < 0.999 * plain
        assert made.spectral_error(rank) is None
        assert made.data_free(rank) is None
    assert errors == sorted(errors, reverse=True)


def test_a_method_that_looks_at_the_samples_is_no_worse_for_it() -> None:
    weight, gram = correlated(SHAPE)
    own, held = SVD.factorize(weight, gram), ThirdParty(SVD).factorize(weight, gram)
    for rank in ((1,), (4,), (9,)):
        assert held.error(rank) == pytest.approx(own.error(rank), rel=1e-6)


def test_the_exact_rank_gives_the_weight() -> None:
    class Wrong(Decoupling):
        def exact_rank(self, shape: LayerShape) -> tuple[int]:
            return (3,)

    weight, gram = correlated(SHAPE)
    exact = ThirdParty(Decoupling()).factorize(weight, gram)
    assert (exact.error((8,)), len(exact.factors((8,)))) == (0.0, 2)
    with pytest.raises(PassError) as caught:
        ThirdParty(Wrong()).factorize(weight, gram).error((3,))
    assert str(caught.value) == (
        "got another weight from the factors at the exact rank (3,) for 8->12 3x3 in pass 'decoupling'; "
        "expected the layer's; mend or remove that package, or leave it out with --passes"
    )


def test_without_samples_its_word_is_taken() -> None:
    weight, _ = correlated(SHAPE)
    own, held = SVD.factorize(weight), ThirdParty(SVD).factorize(weight)
    assert (held.error((3,)), held.spectral_error((3,))) == (own.error((3,)), own.spectral_error((3,)))
    assert all(map(np.array_equal, held.factors((3,)), own.factors((3,))))
