"""What stands behind a layer, and that its micro-models have the same behind them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from builders import RNG, model, value
from chains import outputs
from onnx import ModelProto, NodeProto, TensorProto, helper

from onnx_lowrank.catalogue import all_decompositions
from onnx_lowrank.graph.layers import layers
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.latency.pieces import chain_key
from onnx_lowrank.layer import Layer, NodeShapes
from onnx_lowrank.micro_model import TAIL_CHANNELS, chain_model

SIZE = 12


def node(op: str, inputs: str, output: str, **attributes: Any) -> NodeProto:
    return helper.make_node(op, inputs.split(), [output], name=output, **attributes)


CONV = node("Conv", "y w1", "z")
SHORT = node("Conv", "x w0", "s")
CASES: dict[str, tuple[list[NodeProto], bool]] = {
    "nothing": ([], False),
    "convolution": ([CONV], True),
    "activation": ([node("HardSigmoid", "y", "a"), node("Conv", "a w1", "z")], True),
    "two activations": ([node("Relu", "y", "a"), node("Tanh", "a", "b"), node("Conv", "b w1", "z")], True),
    "unfused activation": ([node("Relu", "y", "a"), node("HardSigmoid", "a", "b"), node("Conv", "b w1", "z")], False),
    "pool": ([node("MaxPool", "y", "p", kernel_shape=[2, 2]), node("Conv", "p w1", "z")], True),
    "residual": ([SHORT, node("Add", "s y", "a"), node("Relu", "a", "r"), node("Conv", "r w1", "z")], True),
    "sum twice": ([SHORT, node("Add", "s y", "a"), node("Conv", "a w1", "z"), node("Add", "a s", "b")], True),
    "constant": ([node("Mul", "y one", "a"), node("Conv", "a w1", "z")], False),
    "flattened": ([node("GlobalAveragePool", "y", "p"), node("Flatten", "p", "z")], False),
    "two readers": ([CONV, node("Transpose", "y", "t")], False),
    "as a weight": ([node("Conv", "x y", "z")], False),
    "ends in no convolution": ([node("Relu", "y", "z")], False),
}


def with_readers(nodes: list[NodeProto]) -> ModelProto:
    """x -> Conv "y" of 16 channels, read by `nodes`."""
    weights = {
        "w0": RNG.standard_normal((16, 16, 1, 1)).astype(np.float32),
        "w1": RNG.standard_normal((16, 16, 1, 1)).astype(np.float32),
        "one": np.ones((1, 16, 1, 1), np.float32),
    }
    graph = [node("Conv", "x w0", "y"), *nodes]
    used = {name for each in graph for name in each.input}
    last = [value(nodes[-1].output[0] if nodes else "y", ["n", "c", "h", "w"])]
    proto = helper.make_graph(
        graph,
        "readers",
        [value("x", [16, 16, 1, 1])],
        last,
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items() if name in used],
    )
    return helper.make_model(proto, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def sited(proto: ModelProto) -> Layer:
    """The first layer, at one site."""
    shapes = NodeShapes(((1, 16, SIZE, SIZE), (16, 16, 1, 1)), ((1, 16, SIZE, SIZE),))
    return layers(Graph(proto), {"y": [shapes]})[0][0]


@pytest.mark.parametrize("case", CASES)
def test_what_stands_behind_a_layer(case: str) -> None:
    nodes, expected = CASES[case]
    layer = sited(with_readers(nodes))
    assert [site.before_conv for site in layer.sites] == [expected]


def test_an_output_is_read_by_the_caller_too() -> None:
    proto = with_readers([CONV])
    proto.graph.output.append(value("y", ["n", "c", "h", "w"]))
    assert not sited(proto).sites[0].before_conv


def test_only_what_stands_in_front_of_a_convolution_has_another_key() -> None:
    inside = sited(with_readers([CONV]))
    site, plain = inside.sites[0], replace(inside.sites[0], before_conv=False)
    assert chain_key(inside, None, site) != chain_key(inside, None, plain)
    outside = sited(with_readers([]))
    assert chain_key(inside, None, plain) == chain_key(outside, None, outside.sites[0])


@pytest.mark.parametrize("elem_type", [TensorProto.FLOAT, TensorProto.DOUBLE])
def test_the_convolution_behind_reads_what_the_chain_makes(elem_type: int) -> None:
    layer = sited(with_readers([CONV]))
    site = layer.sites[0]
    for chain in (None, all_decompositions()["svd"].chain(layer.shape, (4,))):
        timed = chain_model(layer, chain, site, elem_type=elem_type)
        onnx.checker.check_model(timed, full_check=True)
        if elem_type == TensorProto.DOUBLE:  # no kernel for it
            continue
        plain = chain_model(layer, chain, replace(site, before_conv=False))
        feeds = {"x": RNG.standard_normal(site.input_shape).astype(np.float32)}
        y, z = (outputs(each, feeds)[0].astype(np.float64) for each in (plain, timed))
        assert z.shape == (1, TAIL_CHANNELS, 1, 1)
        np.testing.assert_allclose(z[0, :, 0, 0], np.full(TAIL_CHANNELS, y[0, :, 0, 0].mean()), rtol=1e-4, atol=1e-6)


def test_a_chain_that_leaves_the_layout_pays_for_the_way_back(tmp_path: Path) -> None:
    """Reorders of the whole output, in the model and in the micro-models, as onnxruntime places them."""
    weights = {name: RNG.standard_normal((32, 32, 3, 3)).astype(np.float32) for name in ("w0", "w1", "w2")}
    convolutions = [
        node("Conv", f"{x} {w}", y, pads=[1] * 4) for x, w, y in (("x", "w0", "a"), ("a", "w1", "b"), ("b", "w2", "c"))
    ]
    shape = (1, 32, SIZE, SIZE)
    proto = model(convolutions, [value("x", shape)], [value("c", shape)], weights)
    shapes = NodeShapes((shape, (32, 32, 3, 3)), (shape,))
    layer = layers(Graph(proto), {"b": [shapes]})[0][0]
    site = layer.sites[0]
    assert site.before_conv
    svd = all_decompositions()["svd"]
    if not reorders(chain_model(layer, None, site), tmp_path):
        pytest.skip("onnxruntime has no blocked layout on this processor")
    for rank, leaves in ((16, False), (18, True)):  # 18 channels fill no block, and are no multiple of 4 either
        chain = svd.chain(layer.shape, (rank,))
        added = reorders(chain_model(layer, chain, site), tmp_path) - reorders(chain_model(layer, None, site), tmp_path)
        assert (added["ReorderInput"] > 0) == leaves
        plain = replace(site, before_conv=False)
        alone = reorders(chain_model(layer, chain, plain), tmp_path)
        assert alone["ReorderInput"] == reorders(chain_model(layer, None, plain), tmp_path)["ReorderInput"]


def reorders(proto: ModelProto, folder: Path) -> Counter[str]:
    """How many operators of each kind rearrange tensors in the graph that onnxruntime runs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    run = onnx.load(options.optimized_model_filepath).graph.node
    return Counter(each.op_type for each in run if each.op_type.startswith("Reorder"))
