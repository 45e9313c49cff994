"""What a chain asks of a machine: the same from layer and chain as from the words in a latency table."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from builders import conv_model
from onnx import ModelProto, TensorProto
from roads import network, perceptron

from onnx_lowrank import runtime
from onnx_lowrank.catalogue import all_decompositions
from onnx_lowrank.chain import Chain
from onnx_lowrank.graph import keys
from onnx_lowrank.graph.layers import layers
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.latency.work import in_words, read_work, work_of
from onnx_lowrank.layer import Layer, Site
from onnx_lowrank.micro_model import TAIL_CHANNELS
from onnx_lowrank.signature import Feeds
from onnx_lowrank.target import Target

FEEDS = {
    "network": (network(), {"image": np.zeros((2, 3, 16, 16), np.float32)}),
    "half": (perceptron(TensorProto.FLOAT16), {"x": np.zeros((5, 128), np.float16)}),
    "strided": (
        conv_model((2, 8, 9, 12), (16, 8, 3, 5), strides=[2, 3], pads=[1, 2, 1, 2]),
        {"x": np.zeros((2, 8, 9, 12), np.float32)},
    ),
    "grouped": (conv_model((1, 8, 9, 9), (16, 4, 3, 3), group=2), {"x": np.zeros((1, 8, 9, 9), np.float32)}),
    "one axis": (conv_model((2, 8, 20), (16, 8, 5), strides=[2]), {"x": np.zeros((2, 8, 20), np.float32)}),
}


def found(proto: ModelProto, feeds: Feeds) -> Iterator[tuple[Layer, Chain | None, Site]]:
    """Every chain of every layer at every site."""
    graph = Graph(proto)
    trace = runtime.trace(keys.traceable(graph).SerializeToString(), feeds, Target(threads=1))
    for layer in layers(graph, trace)[0]:
        for site in layer.sites:
            yield layer, None, site
            for method in all_decompositions().values():
                if method.refusal(layer.shape) is None:
                    for rank in list(method.ranks(layer.shape, 4))[:3]:
                        yield layer, method.chain(layer.shape, rank), site


@pytest.mark.parametrize("name", FEEDS)
def test_words_hold_all_that_is_done(name: str) -> None:
    pieces = list(found(*FEEDS[name]))
    assert any(chain is not None for _, chain, _ in pieces)
    for layer, chain, site in pieces:
        work = work_of(layer, chain, site)
        assert read_work(in_words(layer, chain, site)) == work
        macs = sum(s.groups * s.out * s.in_ * math.prod(s.kernel) * s.written for s in work.steps)
        tail = TAIL_CHANNELS * layer.shape.out * site.output_shape[0] if site.before_conv else 0
        assert macs == (chain or Chain.unfactored(layer.shape)).site_macs(layer, site) + tail
        first, last = work.steps[0], work.steps[-2 if site.before_conv else -1]
        assert first.groups * first.in_ * first.read == math.prod(site.input_shape)
        assert last.groups * last.out * last.written == math.prod(site.output_shape)
        assert work.layer == in_words(layer, None, site)


def test_words_are_for_readers_too() -> None:
    layer, chain, site = next(piece for piece in found(*FEEDS["strided"]) if is_method(piece[1], "spatial_svd"))
    assert in_words(layer, chain, site) == (
        "Conv 8->16 3x5 at 2x8x9x12 to 2x16x5x4: spatial_svd 1x1x8x3x1@5x12 1x16x1x1x5@5x4"
    )
    layer, chain, site = next(piece for piece in found(*FEEDS["one axis"]) if is_method(piece[1], "kronecker"))
    assert in_words(layer, chain, site) == "Conv 8->16 5 at 2x8x20 to 2x16x8: kronecker 1x8x8x5@8 1x2x1x1*8@8"
    layer, _, site = next(found(*FEEDS["network"]))
    assert in_words(layer, None, site) == "Conv 3->32 3x3 at 2x3x16x16 to 2x32x16x16 before Conv"
    layer, _, site = next(found(*FEEDS["half"]))
    assert in_words(layer, None, site) == "MatMul float16 128->128 at 5x128 to 5x128"


def is_method(chain: Chain | None, name: str) -> bool:
    return chain is not None and chain.method == name


@pytest.mark.parametrize(
    "words",
    [
        "",
        "original model.onnx c32279e91b79",
        "Conv 8->16 3x3 at 1x8x9x9",
        "Conv 8->16 3x3 at 1x8x9x9: svd 1x2x8x3x3 1x16x2x1x1",
        "Conv 8->16 3x3 at 1x8x9x9 to 1x16x9x9: svd 1x2x8 1x16x2",
        "Conv 8->16 3x3 at 1x8x9x9 to 1x16x9x9: svd what",
    ],
)
def test_other_words_are_not_read(words: str) -> None:
    assert read_work(words) is None
