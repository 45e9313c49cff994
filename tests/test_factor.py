"""Factor: a plan becomes a graph, or a sentence says why it cannot."""

from __future__ import annotations

import re

import numpy as np
import pytest
from builders import RNG, model, value
from chains import outputs, relative_error
from onnx import ModelProto, helper

from onnx_lowrank.decomposition import Factorization
from onnx_lowrank.errors import InputError
from onnx_lowrank.graph.layers import layers
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.passes.decompose import decompositions
from onnx_lowrank.passes.factor import Factor
from onnx_lowrank.plan import KEEP, Choice, Plan

METHODS = decompositions()


def two_layers() -> ModelProto:
    weights = {
        "k": RNG.standard_normal((6, 4, 3, 3)).astype(np.float32),
        "b": RNG.standard_normal(6).astype(np.float32),
        "g": RNG.standard_normal((6, 5)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "k", "b"], ["c"], name="conv", pads=[1] * 4, strides=[2, 1]),
        helper.make_node("GlobalMaxPool", ["c"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "g"], ["y"], name="gemm"),
    ]
    return model(nodes, [value("x", ["n", 4, 8, 7])], [value("y", ["n", 5])], weights, ir_version=10)


def plan(*choices: Choice) -> Plan:
    return Plan("0" * 64, choices)


@pytest.mark.parametrize("method", METHODS)
def test_at_full_rank_every_method_reproduces_the_model(method) -> None:
    original = two_layers()
    graph = Graph(original)
    accepted = [layer for layer in layers(graph)[0] if METHODS[method].refusal(layer.shape) is None]
    ranks = [METHODS[method].exact_rank(layer.shape) for layer in accepted]
    choices = [
        Choice(layer.key, layer.nodes[0], method, rank)
        for layer, rank in zip(accepted, ranks, strict=True)
        if rank is not None
    ]
    result = Factor(plan(*choices)).run(graph)
    assert result.modified == bool(choices)
    feeds = {"x": RNG.standard_normal((2, 4, 8, 7)).astype(np.float32)}
    assert relative_error(outputs(original, feeds)[0], outputs(graph.to_proto(), feeds)[0]) < 1e-5


def test_notes_stamp_and_layers_that_are_kept() -> None:
    graph = Graph(two_layers())
    chosen = plan(Choice("conv", "conv", "svd", (3,)), Choice("gemm", "gemm", KEEP))
    result = Factor(chosen).run(graph)
    assert [(note.node, note.text) for note in result.notes] == [("conv", "svd at rank 3")]
    nodes = {node.name: node for node in graph.main.nodes}
    assert list(nodes) == ["conv/svd_0", "conv/svd_1", "", "gemm"]
    stamp = {entry.key: entry.value for entry in nodes["conv/svd_0"].metadata_props}
    assert stamp == {"onnx_lowrank.method": "svd", "onnx_lowrank.rank": "3", "onnx_lowrank.plan": chosen.digest}
    assert graph.main.initializers["conv/svd_0/weight"].dims == [3, 4, 3, 3]
    assert "k" not in graph.main.initializers


def test_an_empty_plan_changes_nothing() -> None:
    original = two_layers()
    graph = Graph(original)
    assert not Factor(plan()).run(graph).modified
    assert graph.to_proto().SerializeToString() == original.SerializeToString()


def test_weights_decomposed_before_are_not_decomposed_again() -> None:
    graph = Graph(two_layers())
    layer = layers(graph)[0][1]
    cut: Factorization = METHODS["svd"].factorize(np.zeros_like(layer.read()))
    Factor(plan(Choice("gemm", "gemm", "svd", (2,))), factorizations={("gemm", "svd"): cut}).run(graph)
    feeds = {"x": RNG.standard_normal((2, 4, 8, 7)).astype(np.float32)}
    assert not outputs(graph.to_proto(), feeds)[0].any()


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        (
            Choice("nowhere", "nowhere", "svd", (2,)),
            "got no node for layer 'nowhere' in the plan; expected a key of this model; "
            "make the plan again for this model",
        ),
        (
            Choice("gemm", "gemm", "magic", (2,)),
            f"got unknown method 'magic' for layer 'gemm' in the plan; expected one of {', '.join(sorted(METHODS))}; "
            "edit the plan",
        ),
        (
            Choice("gemm", "gemm", "svd", (6,)),
            "got rank 6 of svd for layer 'gemm' in the plan; expected 1 to 5; edit the plan",
        ),
        (
            Choice("conv", "conv", "tucker2", (4,)),
            "got rank 4 of tucker2 for layer 'conv' in the plan; expected 1 to 4x6; edit the plan",
        ),
        (
            Choice("conv", "conv", "svd"),
            "got no rank of svd for layer 'conv' in the plan; expected 1 to 6; edit the plan",
        ),
        (
            Choice("gemm", "gemm", "tucker2", (2, 2)),
            "got tucker2 where 6->5 has no kernel: svd reaches the same error with one stage less "
            "for layer 'gemm' in the plan; expected another method; edit the plan",
        ),
    ],
)
def test_plans_that_do_not_fit(choice, text) -> None:
    original = two_layers()
    graph = Graph(original)
    with pytest.raises(InputError, match=f"^{re.escape(text)}$"):
        Factor(plan(Choice("conv", "conv", "svd", (2,)), choice)).run(graph)
    assert graph.to_proto().SerializeToString() == original.SerializeToString()
