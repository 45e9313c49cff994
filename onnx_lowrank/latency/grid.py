"""The channel block of a machine, learnt by probing: a rank between two multiples costs as much as the upper one."""

from __future__ import annotations

from typing import Literal

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnx_lowrank.latency.blocks import PROBE_ROUNDS, PROBED_RANKS, smallest_block
from onnx_lowrank.latency.child import shared
from onnx_lowrank.latency.circumstances import Circumstances
from onnx_lowrank.latency.measure import Until, steady_clock
from onnx_lowrank.latency.messages import Contest, Subject
from onnx_lowrank.latency.table import LatencyTable
from onnx_lowrank.target import Target

Kind = Literal["conv", "matmul"]
KINDS: tuple[Kind, ...] = ("conv", "matmul")
_UNTIL = Until(rounds=PROBE_ROUNDS, budget_s=4.0, most=2 * PROBE_ROUNDS)
_CHANNELS = 128
_DEVICE_BATCH = 16  # on a device one image takes as long as launching two kernels


def channel_block(target: Target, table: LatencyTable, kind: Kind = "conv") -> int:
    """Ranks worth timing are multiples of this number: 4, 8, 16 or 32.

    Takes about a second the first time on a machine; `table` remembers.

    Args:
        target: Where to probe; the block differs between providers.
        table: Keeps the answer.
        kind: "conv" for 2-D convolutions; "matmul" for MatMul, Gemm and 1-D convolutions, which have no blocked layout.
    """
    where = Circumstances.here(target)
    if (known := known_block(where, table, kind)) is not None:
        return known
    block = smallest_block(_probe(target, kind))
    remember_block(where, table, kind, block)
    return block


def known_block(where: Circumstances, table: LatencyTable, kind: Kind = "conv") -> int | None:
    """The answer `channel_block` would give without probing, or None."""
    known = table.fact(_key(where, kind))
    return None if known is None else int(known)


def remember_block(where: Circumstances, table: LatencyTable, kind: Kind, block: int) -> None:
    """Keep a block that was learnt there."""
    table.put_fact(_key(where, kind), str(block))


def probe_model(rank: int, kind: Kind, provider: str) -> ModelProto:
    """The model that is timed at one of `PROBED_RANKS`: two stages of `rank` channels between them, input "x"."""
    shape = _shape(kind, provider)
    width = shape[1]
    if kind == "conv":
        sizes = [(rank, width, 3, 1), (width, rank, 1, 3)]
        pads = [[1, 0, 1, 0], [0, 1, 0, 1]]
        nodes = [
            helper.make_node("Conv", ["x", "w0"], ["h"], pads=pads[0]),
            helper.make_node("Conv", ["h", "w1"], ["y"], pads=pads[1]),
        ]
    else:
        sizes = [(width, rank), (rank, width)]
        nodes = [helper.make_node("MatMul", ["x", "w0"], ["h"]), helper.make_node("MatMul", ["h", "w1"], ["y"])]
    weights = [np.full(size, 1 / width, np.float32) for size in sizes]
    tensors = [numpy_helper.from_array(weight, f"w{i}") for i, weight in enumerate(weights)]
    value, result = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y"))
    graph = helper.make_graph(nodes, "probe", [value], [result], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)


def _key(where: Circumstances, kind: Kind) -> str:
    # The probes are always run at level "all", whatever the chains are timed at.
    return f"channel block of {kind} {where.at('all').digest}"


def _probe(target: Target, kind: Kind) -> dict[int, float]:
    """Rank -> latency relative to the highest one."""
    feeds = {"x": np.ones(_shape(kind, target.provider), np.float32)}
    ranks = PROBED_RANKS[::-1]
    models = [probe_model(rank, kind, target.provider).SerializeToString() for rank in ranks]
    subjects = [Subject(model, "all", target, [(feeds, 1.0)]) for model in models]
    found = shared().ask(Contest(subjects, _UNTIL, steady_clock(target)))
    for error in found.refused.values():
        raise error
    assert found.paired is not None  # noqa: S101 - nothing was refused
    return {rank: 1 / ratio for rank, ratio in zip(ranks, found.paired.ratios, strict=True)}


def _shape(kind: Kind, provider: str) -> tuple[int, ...]:
    batch = 1 if provider == "cpu" else _DEVICE_BATCH
    return (batch, _CHANNELS, 28, 28) if kind == "conv" else (256 * batch, 4 * _CHANNELS)
