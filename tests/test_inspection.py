"""inspect: every weight-bearing layer with its share of the work, its spectrum and a verdict."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
from onnx import numpy_helper
from rich.console import Console
from roads import network, on_one_thread, parameter_count, perceptron, save, shared, weight_bearing

from onnx_lowrank.inspection import InspectedLayer, inspect, render, render_spectra, unreached

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, quick: None) -> dict[str, InspectedLayer]:
    path = save(network(), tmp_path_factory.mktemp("inspect"))
    return {row.name: row for row in inspect(path, on_one_thread(keep=("stem",)))}


def test_every_weight_bearing_node_is_listed(rows: dict[str, InspectedLayer]) -> None:
    assert sorted(rows) == sorted(weight_bearing(network()))


def test_shares_are_of_the_whole_model(rows: dict[str, InspectedLayer]) -> None:
    assert sum(row.macs_share for row in rows.values()) == pytest.approx(1)
    body = rows["body/2"]
    assert (body.params, body.macs) == (64 * 64 * 9, 64 * 64 * 9 * 8 * 8)
    assert body.params_share == pytest.approx(body.params / parameter_count(network()))


def test_the_spectrum_is_numpys(rows: dict[str, InspectedLayer]) -> None:
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in network().graph.initializer}
    sigma = np.linalg.svd(weights["w2"].reshape(64, -1).astype(np.float64), compute_uv=False)
    kept = np.cumsum(sigma**2) / np.sum(sigma**2)
    p = sigma / sigma.sum()
    body = rows["body/2"]
    assert body.full_rank == 64
    assert body.energy_ranks == tuple(int(np.argmax(kept >= share)) + 1 for share in (0.9, 0.99))
    assert body.effective_rank == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-5)
    assert body.energy_ranks[1] <= 8  # the weight was made of rank 8, and a little noise


def test_verdicts(rows: dict[str, InspectedLayer]) -> None:
    assert rows["body/2"].verdict == "can become cp, spatial_svd, spatial_svd_reversed, svd, svd_input, tucker2"
    assert rows["head"].verdict == "can become svd"
    assert rows["stem"].verdict == "stays: pinned by --keep stem"
    assert rows["depthwise"].verdict.startswith("stays: ")
    assert rows["gram"].verdict.startswith("stays: ")
    for name, row in rows.items():
        assert (row.ms is not None) == (name in {"body/1", "body/2", "head"})


def test_nodes_of_one_weight_are_one_row(tmp_path: Path) -> None:
    rows = inspect(save(shared(), tmp_path), on_one_thread())
    assert [row.name for row in rows] == ["one", "other"]
    assert rows[0].macs == 3 * rows[1].macs


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_fits(rows: dict[str, InspectedLayer], width: int) -> None:
    text = io.StringIO()
    Console(file=text, width=width).print(render(list(rows.values())))
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    if width == 200:
        (body,) = (line for line in lines if line.startswith("body/2"))
        assert "64->64 3x3" in body
        assert "can become cp, spatial_svd" in body


def test_measures_of_every_factorable_layer(rows: dict[str, InspectedLayer]) -> None:
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in network().graph.initializer}
    sigma = np.linalg.svd(weights["w2"].reshape(64, -1).astype(np.float64), compute_uv=False)
    for name, row in rows.items():
        assert (row.spectrum is not None) == (name in {"body/1", "body/2", "head"})
        assert row.whitened is None
    found = rows["body/2"].spectrum
    assert found is not None
    assert found.stable_rank == pytest.approx(np.sum(sigma**2) / sigma[0] ** 2, rel=1e-5)
    assert found.nuclear_norm == pytest.approx(sigma.sum(), rel=1e-5)
    assert found.evb_rank == 8  # as it was made: noise of a hundredth on rank 8
    assert (found.full_rank, found.effective_rank) == (rows["body/2"].full_rank, rows["body/2"].effective_rank)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two products of rank 6, and samples that lie in three of the 128 dimensions of their input."""
    folder = tmp_path_factory.mktemp("narrow")
    rng = np.random.default_rng(0)
    plane = np.linalg.qr(rng.standard_normal((128, 3)))[0].T
    np.savez(folder / "x.npz", x=(rng.standard_normal((64, 40, 3)) @ plane).astype(np.float32))
    return save(perceptron(), folder)


def test_whitened_spectra_are_of_what_the_samples_make_of_a_layer(narrow: Path) -> None:
    settings = on_one_thread(calibration=narrow.with_name("x.npz"))
    first, second = inspect(narrow, settings, whitened=True)
    for row in (first, second):
        assert row.spectrum is not None
        assert row.whitened is not None
        assert row.spectrum.evb_rank == 6
        assert row.whitened.full_rank == row.spectrum.full_rank == 128
        assert row.whitened.energy_ranks[-1] <= 3 < row.spectrum.energy_ranks[-1]
    # What the first product computes from white inputs of its plane: the singular values of W on the plane.
    weight = numpy_helper.to_array(perceptron().graph.initializer[0]).astype(np.float64)
    given = np.load(narrow.with_name("x.npz"))["x"].astype(np.float64).reshape(-1, 128)
    root = np.linalg.cholesky(given.T @ given / len(given) + 1e-9 * np.eye(128))
    sigma = np.linalg.svd(weight.T @ root, compute_uv=False)
    assert first.whitened is not None
    assert first.whitened.nuclear_norm == pytest.approx(sigma[:3].sum(), rel=0.05)
    assert first.whitened.stable_rank == pytest.approx(np.sum(sigma**2) / sigma[0] ** 2, rel=0.05)
    plain = inspect(narrow, settings)
    assert [row.whitened for row in plain] == [None, None]
    assert (unreached([first, second]), unreached(plain)) == ([], [row.name for row in plain])


@pytest.mark.parametrize("width", [100, 200])
def test_the_spectrum_table_fits(narrow: Path, width: int) -> None:
    text = io.StringIO()
    rows = inspect(narrow, on_one_thread(calibration=narrow.with_name("x.npz")), whitened=True)
    Console(file=text, width=width).print(render_spectra(rows))
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert [line.split()[:2] for line in lines[1:]] == [
        ["first", "weight"],
        ["outputs", "128"],
        ["second", "weight"],
        ["outputs", "128"],
    ]
