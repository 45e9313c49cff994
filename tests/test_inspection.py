"""inspect: every weight-bearing layer with its share of the work, its spectrum and a verdict."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
from onnx import numpy_helper
from rich.console import Console
from roads import network, on_one_thread, parameter_count, save, shared, weight_bearing

from onnx_lowrank.inspection import InspectedLayer, inspect, render

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
    assert rows["body/2"].verdict == "can become spatial_svd, spatial_svd_reversed, svd, svd_input, tucker2"
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
        assert "can become spatial_svd" in body
