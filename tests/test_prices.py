"""Prices of chains: remembered, shared, weighted, marked, bounded in memory; and the block they are laid out by."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto

from onnx_lowrank.chain import Chain, Stage
from onnx_lowrank.latency.blocks import PROBED_RANKS, UNTOLD, smallest_block
from onnx_lowrank.latency.chains import ChainTimer
from onnx_lowrank.latency.circumstances import Circumstances
from onnx_lowrank.latency.grid import KINDS, Kind, channel_block, known_block, probe_model
from onnx_lowrank.latency.pieces import Job, Piece, batches, chain_key
from onnx_lowrank.latency.table import LatencyTable
from onnx_lowrank.layer import Form, Geometry, Layer, LayerShape, Site
from onnx_lowrank.target import Target

ONE = Target(threads=1)
HERE = Circumstances.here(ONE)


def layer(key: str = "c", elem_type: int = TensorProto.FLOAT, sites: int = 1, stride: int = 1) -> Layer:
    shape = LayerShape(1, 16, 8, (3, 3))
    form = Form("Conv", elem_type, 17, Geometry((stride, stride), (1, 1), (1, 1, 1, 1)), bias=True)
    out = 8 // stride
    where = tuple(Site(f"{key}{i}", (1, 8, 8, 8), (1, 16, out, out), count=i + 1.0) for i in range(sites))
    return Layer(key, shape, form, tuple(site.node for site in where), where, "w", lambda: np.zeros(shape.weight))


def chain(rank: int, out: int = 16) -> Chain:
    stages = (Stage(1, rank, 8, (3, 3), (0, 1)), Stage(1, out, rank, (1, 1)))
    return Chain("svd", stages, "grchw,gsrab->gschw")


def test_prices_are_remembered_and_shared(tmp_path: Path):
    jobs = [Job(layer()), Job(layer(), chain(4)), Job(layer(), chain(8)), Job(layer("twin"), chain(4))]
    calls: list[tuple[int, int]] = []
    with LatencyTable(tmp_path / "t.sqlite") as table:
        timer = ChainTimer(ONE, table)
        prices = timer.price(jobs, lambda done, total: calls.append((done, total)))
        assert timer.timed == 3
        assert not timer.dropped
        assert all(price is not None and price > 0 for price in prices)
        assert prices[1] == prices[3]
        assert calls[-1] == (3, 3)
    with LatencyTable(tmp_path / "t.sqlite") as table:
        warm = ChainTimer(ONE, table)
        assert warm.price(jobs) == prices
        assert (warm.timed, warm.priced) == (0, 3)


def test_a_price_remembers_what_disturbed_it(tmp_path: Path):
    jobs = [Job(layer()), Job(layer(), chain(4)), Job(layer(), chain(8))]
    with LatencyTable(tmp_path / "t.sqlite") as table:
        first = ChainTimer(ONE, table)
        first.price(jobs)
        held = table.record(chain_key(layer(), chain(4), layer().sites[0]), first.where)
        assert held is not None
        for disturbed in (False, True):
            table.put(first.where, replace(held, disturbed=disturbed))
            timer = ChainTimer(ONE, table)
            timer.price(jobs)
            seen = sum(record.disturbed for record in table.records(first.where))
            assert (timer.timed, timer.priced, timer.disturbed) == (0, 3, seen)
            assert disturbed <= bool(seen)


def test_chains_of_a_layer_that_was_forgotten_are_timed_anew_with_it(tmp_path: Path):
    jobs = [Job(layer()), Job(layer(), chain(4)), Job(layer(), chain(8))]
    own = chain_key(layer(), None, layer().sites[0])
    with LatencyTable(tmp_path / "t.sqlite") as table:
        first = ChainTimer(ONE, table)
        first.price(jobs[:2])
        held = table.record(own, first.where)
        assert held is not None
        table.put(first.where, replace(held, disturbed=True))
        more = ChainTimer(ONE, table)
        more.price(jobs)  # in another batch: the layer is there again, as the scale, and not put again
        assert (more.timed, table.record(own, first.where)) == (1, replace(held, disturbed=True))
        table.forget(first.where, disturbed=True)
        again = ChainTimer(ONE, table)
        again.price(jobs)
        assert again.timed == 3


def test_price_is_the_weighted_sum_over_sites(tmp_path: Path):
    with LatencyTable(tmp_path / "t.sqlite") as table:
        timer = ChainTimer(ONE, table)
        single, triple = timer.price([Job(layer()), Job(layer(sites=2))])  # counts 1, and 1 + 2
        assert timer.timed == 1
        assert single is not None
        assert triple == pytest.approx(3 * single)


def test_layer_alone_is_timed_even_when_only_its_chain_is_asked_for(tmp_path: Path):
    with LatencyTable(tmp_path / "t.sqlite") as table:
        timer = ChainTimer(ONE, table)
        timer.price([Job(layer(), chain(4))])
        assert timer.timed == 2
        timer.price([Job(layer())])
        assert timer.timed == 2


def test_chain_that_cannot_be_timed_is_dropped(tmp_path: Path):
    broken = replace(chain(4), stages=(chain(4).stages[0], Stage(1, 16, 5, (1, 1))))
    with LatencyTable(tmp_path / "t.sqlite") as table:
        timer = ChainTimer(ONE, table)
        prices = timer.price([Job(layer()), Job(layer(), broken), Job(layer(), chain(4))])
        assert [price is None for price in prices] == [False, True, False]
        assert [dropped.chain for dropped in timer.dropped] == [broken]
        assert timer.dropped[0].reason.startswith("got ")


def test_types_without_kernels_are_priced_as_float32(tmp_path: Path):
    with LatencyTable(tmp_path / "t.sqlite") as table:
        timer = ChainTimer(ONE, table)
        (price,) = timer.price([Job(layer(elem_type=TensorProto.DOUBLE), chain(4))])
        assert price is not None
        assert not timer.dropped


def test_what_is_open_at_once_is_bounded():
    pieces = [Piece(Job(layer(), chain(rank)), layer().sites[0]) for rank in (4, 8, 12)]
    own = pieces[0].own
    room = own.open_bytes + pieces[0].open_bytes + pieces[1].open_bytes
    assert [len(batch) for batch in batches(pieces, room)] == [3, 2]
    assert [len(batch) for batch in batches(pieces, 0)] == [2, 2, 2]
    assert all(batch[0] == own for batch in batches(pieces, 0))
    large = replace(layer().sites[0], input_shape=(1, 8, 640, 640), output_shape=(1, 16, 640, 640))
    assert Piece(Job(layer()), large).open_bytes > 4 * 640 * 640 * (8 + 16)  # activations, not weights alone


@pytest.mark.parametrize("block", [4, 8, 16, 32])
def test_block_of_a_machine_that_pads(block):
    rng = np.random.default_rng(0)
    padded = {rank: (20 + -(-rank // block) * block) * rng.uniform(0.99, 1.01) for rank in PROBED_RANKS}
    assert smallest_block(padded) == block


@pytest.mark.parametrize("kind", ["conv", "matmul"])
def test_block_is_probed_once(tmp_path: Path, kind):
    with LatencyTable(tmp_path / "t.sqlite") as table:
        assert known_block(HERE, table, kind) is None
        block = channel_block(ONE, table, kind)
        assert block in {4, 8, 16, 32}
        assert known_block(HERE, table, kind) == block
        assert channel_block(ONE, table, kind) == block


def test_a_machine_on_which_ranks_cost_nothing_tells_no_block():
    assert smallest_block(dict.fromkeys(PROBED_RANKS, 1.0)) == UNTOLD
    assert smallest_block({rank: 1 + rank / 1000 for rank in PROBED_RANKS}) == UNTOLD


@pytest.mark.parametrize("kind", KINDS)
def test_devices_are_probed_by_batches(kind: Kind):
    """One image takes as long as launching two kernels there."""
    on_cpu, on_gpu = (probe_model(32, kind, provider).graph.input[0] for provider in ("cpu", "cuda"))
    sizes = [math.prod(d.dim_value for d in value.type.tensor_type.shape.dim) for value in (on_cpu, on_gpu)]
    assert sizes[1] == 16 * sizes[0]
