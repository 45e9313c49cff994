"""The channel block of a machine, learnt by probing: a rank between two multiples of it costs as much as the upper one.

A chain is timed at ranks between 32 and 64. If b is the kernels' block, stepping down from a multiple of 2b by b saves
about its share of the time; a smaller step saves nothing, or costs what leaving the blocked layout costs.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnx_lowrank.latency.child import shared
from onnx_lowrank.latency.measure import Until, steady_clock
from onnx_lowrank.latency.messages import Contest, Subject
from onnx_lowrank.latency.table import LatencyTable, table_key
from onnx_lowrank.target import Target

Kind = Literal["conv", "matmul"]
_LOW, _HIGH = 32, 64
_BLOCKS = (4, 8, 16)
_LARGEST = 32
_RANKS = sorted({_LOW, _HIGH} | {rank for block in _BLOCKS for rank in (_LOW + block, _HIGH - block)})
_UNTIL = Until(rounds=61, budget_s=4.0, most=122)
_CHANNELS = 128


def channel_block(target: Target, table: LatencyTable, kind: Kind = "conv") -> int:
    """Ranks worth timing are multiples of this number: 4, 8, 16 or 32.

    Takes about a second the first time on a machine; `table` remembers.

    Args:
        target: Where to probe; the block differs between providers.
        table: Keeps the answer.
        kind: "conv" for 2-D convolutions; "matmul" for MatMul, Gemm and 1-D convolutions, which have no blocked layout.
    """
    key = table_key(f"channel block of {kind}", target, "all")
    if (known := table.fact(key)) is not None:
        return int(known)
    block = smallest_block(_probe(target, kind))
    table.put_fact(key, str(block))
    return block


def known_block(target: Target, table: LatencyTable, kind: Kind = "conv") -> int | None:
    """The answer `channel_block` would give without probing, or None."""
    known = table.fact(table_key(f"channel block of {kind}", target, "all"))
    return None if known is None else int(known)


def smallest_block(latency: dict[int, float]) -> int:
    """The smallest block by which a rank can step down and save at least a third of its share.

    Args:
        latency: Rank -> latency in any unit, for the multiples of 4 from 32 to 64 that `_RANKS` names.
    """
    per_rank = (latency[_HIGH] - latency[_LOW]) / (_HIGH - _LOW)
    for block in _BLOCKS:
        steps = ((rank, rank + block) for rank in (_LOW + block, _HIGH - block))
        if all(latency[upper] - latency[rank] >= block * per_rank / 3 for rank, upper in steps):
            return block
    return _LARGEST


def _probe(target: Target, kind: Kind) -> dict[int, float]:
    """Rank -> latency relative to rank 64."""
    feeds = {"x": np.ones(_shape(kind), np.float32)}
    ranks = [_HIGH, *(rank for rank in _RANKS if rank != _HIGH)]
    subjects = [Subject(_chain(rank, kind).SerializeToString(), "all", target, [(feeds, 1.0)]) for rank in ranks]
    found = shared().ask(Contest(subjects, _UNTIL, steady_clock(target)))
    for error in found.refused.values():
        raise error
    assert found.paired is not None  # noqa: S101 - nothing was refused
    return {rank: 1 / ratio for rank, ratio in zip(ranks, found.paired.ratios, strict=True)}


def _shape(kind: Kind) -> tuple[int, ...]:
    return (1, _CHANNELS, 28, 28) if kind == "conv" else (256, 4 * _CHANNELS)


def _chain(rank: int, kind: Kind) -> ModelProto:
    """Two stages of `rank` channels between them."""
    rng = np.random.default_rng(0)
    shape = _shape(kind)
    width = shape[1]
    if kind == "conv":
        weights = [rng.standard_normal((rank, width, 3, 1)), rng.standard_normal((width, rank, 1, 3))]
        pads = [[1, 0, 1, 0], [0, 1, 0, 1]]
        nodes = [
            helper.make_node("Conv", ["x", "w0"], ["h"], pads=pads[0]),
            helper.make_node("Conv", ["h", "w1"], ["y"], pads=pads[1]),
        ]
    else:
        weights = [rng.standard_normal((width, rank)), rng.standard_normal((rank, width))]
        nodes = [helper.make_node("MatMul", ["x", "w0"], ["h"]), helper.make_node("MatMul", ["h", "w1"], ["y"])]
    tensors = [numpy_helper.from_array(weight.astype(np.float32), f"w{i}") for i, weight in enumerate(weights)]
    value, result = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y"))
    graph = helper.make_graph(nodes, "probe", [value], [result], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
