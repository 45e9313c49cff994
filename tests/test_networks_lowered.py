"""Formats whose stages are shared over modes, in models: lowered layers, plans, ranks and layers that are refused."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from builders import conv_model, product_model
from chains import outputs, relative_error
from onnx import ModelProto

from onnx_lowrank.chain import Fit
from onnx_lowrank.decomposition import Rank
from onnx_lowrank.errors import InputError
from onnx_lowrank.graph.layers import layers
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.layer import LayerShape
from onnx_lowrank.pass_manager import PassManager
from onnx_lowrank.passes.decompose import decompositions
from onnx_lowrank.passes.decompose.network import NetworkFormat
from onnx_lowrank.passes.factor import Factor
from onnx_lowrank.plan import Choice, Plan
from onnx_lowrank.rewrite import Replacement, layer_name, splice

METHODS = {name: method for name, method in decompositions().items() if isinstance(method, NetworkFormat)}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
MATRIX = LayerShape(1, 16, 24)
RNG = np.random.default_rng(6)

MODELS: list[tuple[ModelProto, Sequence[int]]] = [
    (conv_model(("n", 8, "h", "w"), (16, 8, 3, 3), strides=[2, 1], pads=[1, 0, 2, 1], dilations=[1, 2]), (2, 8, 9, 8)),
    (conv_model(("n", 12, "w"), (8, 12, 3), bias=False, auto_pad="SAME_UPPER", strides=[2]), (3, 12, 7)),
    (conv_model(("n", 8, "h", "w"), (24, 8, 1, 1), strides=[1, 2]), (2, 8, 5, 6)),
    (product_model("Gemm", (5, 24), (24, 16), c=(16,)), (5, 24)),
    (product_model("MatMul", (2, 5, 24), (24, 16)), (2, 5, 24)),
    (product_model("MatMul", (24, 5), (16, 24), left=True), (24, 5)),
]


@every_method
@pytest.mark.parametrize(("proto", "x"), MODELS, ids=["Conv", "Conv1d", "1x1", "Gemm", "MatMul", "left"])
def test_lowered_layers(method: NetworkFormat, proto: ModelProto, x: Sequence[int]) -> None:
    """What runs is the dense weight that the factors stand for."""
    graph = Graph(proto)
    (layer,), _ = layers(graph, check=False)
    if method.refusal(layer.shape) is not None:
        return
    rank = method.ranks(layer.shape, 1)[-1]
    chain, factors = method.chain(layer.shape, rank), method.factorize(layer.read()).factors(rank)
    feeds = {"x": RNG.standard_normal(tuple(x)).astype(np.float32)}
    results: list[np.ndarray] = []
    for what, arrays in ((chain, factors), (chain.unfactored(layer.shape), [chain.dense(factors)])):
        one = Graph(proto)
        (found,), _ = layers(one, check=False)
        splice(one, [Replacement(found, what, Fit(tuple(arrays)), {})])
        results.append(np.asarray(outputs(one.to_proto(), feeds)[0]))
    assert relative_error(results[1], results[0]) < 1e-5


@every_method
def test_plans(method: NetworkFormat) -> None:
    """A plan names a format by its numbers; what they make of the model is valid, stamped and the layer's own."""
    proto = product_model("MatMul", (2, 5, 24), (24, 16)) if method.refusal(MATRIX) is None else MODELS[0][0]
    (layer,), _ = layers(Graph(proto), check=False)
    rank = method.ranks(layer.shape, 1)[-1]
    plan = Plan("0" * 64, (Choice(layer.key, layer.nodes[0], method.name, rank),))
    graphs = [Graph(proto) for _ in range(2)]
    for graph in graphs:
        (record,) = PassManager([Factor(Plan.from_json(plan.to_json()))]).run(graph)
        assert record.modified
    first, second = (graph.to_proto() for graph in graphs)
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)
    running = [node for node in first.graph.node if node.op_type != "Constant"]
    assert {layer_name(node) for node in running} == {layer.nodes[0]}


@pytest.mark.parametrize(
    ("name", "shape", "rank", "expected"),
    [
        (
            "kronecker",
            LayerShape(1, 12, 8, (3, 3)),
            (5, 2, 3, 1, 2),
            "a divisor of 12, one of 8, 1 or 3, 1 or 3, and no more terms than are exact",
        ),
        ("kronecker", LayerShape(1, 12, 8), (3, 2, 7), "a divisor of 12, one of 8, and no more terms than are exact"),
        ("tt_matrix", MATRIX, (2, 3), "3x1 to 3x8 or 4x1 to 4x16"),
        ("hierarchical_tucker", MATRIX, (3, 99), "3x1 to 3x8 or 4x1 to 4x16"),
        (
            "tensor_ring",
            LayerShape(1, 16, 8, (3, 3)),
            (9, 2, 2),
            "three ranks, the first two at most 16 as a product, the last two at most 8",
        ),
        (
            "semi_tensor",
            LayerShape(1, 16, 8),
            (3, 3, 3),
            "t, which divides 16 and 8, then a multiple of t up to 8, a multiple of t up to 16",
        ),
        (
            "semi_tensor_ring",
            LayerShape(1, 16, 8, (3,)),
            (),
            "t, which divides 16 and 8, then a multiple of t up to 16, a number up to 8, a multiple of t up to 8",
        ),
    ],
)
def test_ranks_that_do_not_fit(name: str, shape: LayerShape, rank: Rank, expected: str) -> None:
    assert METHODS[name].misfit(shape, rank) == expected


def test_a_plan_with_such_a_rank_is_refused() -> None:
    graph = Graph(product_model("MatMul", (2, 5, 24), (24, 16)))
    with pytest.raises(InputError) as caught:
        Factor(Plan("0" * 64, (Choice("product", "product", "tt_matrix", (2, 3)),))).run(graph)
    assert str(caught.value) == (
        "got rank 2x3 of tt_matrix for layer 'product' in the plan; expected 3x1 to 3x8 or 4x1 to 4x16; edit the plan"
    )


@pytest.mark.parametrize(
    ("name", "shape", "sentence"),
    [
        (
            "kronecker",
            LayerShape(2, 8, 6, (3, 3)),
            "2*6->8 3x3 has groups: tensor networks are not built for groups yet, svd is",
        ),
        (
            "kronecker",
            LayerShape(1, 7, 5),
            "5->7 has prime numbers of channels: every Kronecker product of that shape is an svd",
        ),
        ("tt_matrix", LayerShape(1, 16, 24, (3, 3)), "24->16 3x3 has a kernel: tt_matrix cuts matrices"),
        (
            "tt_matrix",
            LayerShape(3, 16, 24),
            "3*24->16 has groups: tensor networks are not built for groups yet, svd is",
        ),
        (
            "hierarchical_tucker",
            LayerShape(1, 10, 24),
            "24->10 has a side that is no product of three numbers: kronecker cuts it into two",
        ),
        ("tensor_ring", MATRIX, "24->16 has no kernel: a ring of two cores is an svd"),
        (
            "tensor_ring",
            LayerShape(2, 16, 24, (3,)),
            "2*24->16 3 has groups: tensor networks are not built for groups yet, svd is",
        ),
        (
            "tensor_ring",
            LayerShape(1, 3, 24, (3,)),
            "24->3 3 has fewer than four channels on a side: tucker2 gives the same chain",
        ),
        (
            "semi_tensor",
            LayerShape(1, 9, 24),
            "24->9 has no even number of channels above two on both sides: no ratio divides them",
        ),
        (
            "semi_tensor_train",
            LayerShape(2, 8, 8, (3,)),
            "2*8->8 3 has groups: tensor networks are not built for groups yet, svd is",
        ),
        ("semi_tensor_ring", LayerShape(1, 8, 8), "8->8 has no kernel: semi_tensor has one stage less"),
    ],
)
def test_refusals(name: str, shape: LayerShape, sentence: str) -> None:
    assert METHODS[name].refusal(shape) == sentence
