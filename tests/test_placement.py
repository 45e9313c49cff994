"""What a strict run on an accelerator asks for, as far as it can be known without one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import conv_model, model, value
from onnx import ModelProto, TensorProto, helper

from onnx_lowrank.errors import ProviderError
from onnx_lowrank.latency.circumstances import Circumstances
from onnx_lowrank.latency.gpus import Card
from onnx_lowrank.placement import shapes_only
from onnx_lowrank.progress import Phases
from onnx_lowrank.search.racer import Sample
from onnx_lowrank.search.survey import on_host_note
from onnx_lowrank.search.tuning import tuned
from onnx_lowrank.settings import Settings
from onnx_lowrank.signature import parsed_spec
from onnx_lowrank.target import CONV_SEARCHES, Target

CUDA = Target("cuda", threads=1)


def reshaping() -> ModelProto:
    """x -> Reshape to (n, -1), the length computed as exporters do, beside integers that come from the data."""
    nodes = [
        helper.make_node("Shape", ["x"], ["s"], name="shape"),
        helper.make_node("Gather", ["s", "zero"], ["n"], name="gather", axis=0),
        helper.make_node("Unsqueeze", ["n", "zero1"], ["n1"], name="unsqueeze"),
        helper.make_node("Concat", ["n1", "rest"], ["to"], name="concat", axis=0),
        helper.make_node("Reshape", ["x", "to"], ["flat"], name="reshape"),
        helper.make_node("ArgMax", ["flat"], ["best"], name="argmax", axis=1),
        helper.make_node("Gather", ["table", "best"], ["y"], name="lookup", axis=0),
    ]
    constants = {
        "zero": np.array(0, np.int64),
        "zero1": np.array([0], np.int64),
        "rest": np.array([-1], np.int64),
        "table": np.ones((16, 2), np.float32),
    }
    return model(nodes, [value("x", ["n", 4, 4])], [value("y", ["n", 1, 2])], constants)


def test_computations_of_shapes_may_stay_on_the_host() -> None:
    left = [("Gather", "gather"), ("Unsqueeze", "unsqueeze"), ("Concat", "concat")]
    assert shapes_only(left, reshaping(), CUDA) == ("Gather gather", "Unsqueeze unsqueeze", "Concat concat")


@pytest.mark.parametrize("node", ["reshape", "argmax", "lookup"])
def test_what_touches_data_may_not(node: str) -> None:
    op = next(entry.op_type for entry in reshaping().graph.node if entry.name == node)
    with pytest.raises(ProviderError) as caught:
        shapes_only([("Concat", "concat"), (op, node)], reshaping(), CUDA)
    assert str(caught.value) == (
        f"got 1 nodes that cuda leaves to another provider ({op} {node}); expected every node on "
        "CUDAExecutionProvider, computations of shapes excepted; allow it with --allow-fallback, or choose another "
        "provider"
    )


def test_a_node_nobody_knows_may_not() -> None:
    with pytest.raises(ProviderError, match=r"4 nodes that cuda .*Gemm a, Gemm b, Gemm c and 1 more"):
        shapes_only([("Gemm", name) for name in "abcd"], reshaping(), CUDA)


def test_a_name_that_two_nodes_bear_counts_only_if_both_compute_shapes() -> None:
    proto = reshaping()
    for node in proto.graph.node:
        node.name = ""
    assert shapes_only([("Concat", "")], proto, CUDA) == ("Concat",)
    with pytest.raises(ProviderError, match="Gather"):
        shapes_only([("Gather", "")], proto, CUDA)


def test_weights_of_shapes_are_compute_all_the_same() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Cast", ["s"], ["f"], name="cast", to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["f", "w"], ["y"], name="product"),
    ]
    proto = model(nodes, [value("x", ["n", 3])], [value("y", [5])], {"w": np.ones((2, 5), np.float32)})
    assert shapes_only([("Cast", "cast")], proto, CUDA) == ("Cast cast",)
    with pytest.raises(ProviderError, match="MatMul product"):
        shapes_only([("MatMul", "product")], proto, CUDA)


def test_bodies_see_the_shapes_around_them_and_count_their_rounds() -> None:
    body = helper.make_graph(
        [
            helper.make_node("Add", ["i", "n"], ["j"], name="count"),
            helper.make_node("Identity", ["c"], ["c2"], name="go_on"),
            helper.make_node("Add", ["v", "v"], ["v2"], name="double"),
        ],
        "body",
        [value("i", [], TensorProto.INT64), value("c", [], TensorProto.BOOL), value("v", [2])],
        [value("c2", [], TensorProto.BOOL), value("v2", [2])],
    )
    nodes = [
        helper.make_node("Size", ["x"], ["n"], name="size"),
        helper.make_node("Loop", ["n", "", "x"], ["y"], name="loop", body=body),
    ]
    proto = model(nodes, [value("x", [2])], [value("y", [2])])
    left = [("Size", "size"), ("Add", "count"), ("Identity", "go_on")]
    assert len(shapes_only(left, proto, CUDA)) == 3
    for label in (("Add", "double"), ("Loop", "loop")):
        with pytest.raises(ProviderError, match=label[1]):
            shapes_only([label], proto, CUDA)


def test_they_are_named_in_the_report() -> None:
    assert on_host_note((), CUDA) == ()
    assert on_host_note(("Gather a", "Concat b", "Cast c", "Add d"), CUDA) == (
        "shapes are computed on the CPU, everything else on cuda: Gather a, Concat b, Cast c and 1 more",
    )


def test_numbers_are_compared_without_tensor_float_32() -> None:
    target = dataclasses.replace(CUDA, provider_options={"use_tf32": "1", "device_id": "1"})
    assert target.exact().provider_options == {"use_tf32": "0", "device_id": "1"}
    assert Target(threads=1).exact() == Target(threads=1)
    assert Target("openvino", threads=1).for_samples() == Target(threads=1).for_samples() == Target()
    walked = Target("cuda", threads=1).for_samples()
    assert (walked.provider, walked.provider_options["use_tf32"], walked.allow_fallback) == ("cuda", "0", True)


def test_both_convolution_searches_are_tried_unless_one_is_given() -> None:
    tried = CUDA.variants()
    assert [target.provider_options["cudnn_conv_algo_search"] for target in tried] == list(CONV_SEARCHES)
    assert {target.provider_options["use_tf32"] for target in tried} == {"1"}
    given = {"cudnn_conv_algo_search": "DEFAULT", "use_tf32": "0"}
    assert [t.provider_options for t in dataclasses.replace(CUDA, provider_options=given).variants()] == [given]
    assert Target(threads=1).variants() == (Target(threads=1),)


def test_memory_is_bound_on_the_device_that_runs() -> None:
    assert CUDA.device == ("cuda", 0)
    assert dataclasses.replace(CUDA, provider_options={"device_id": "2"}).device == ("cuda", 2)
    assert Target("openvino", threads=1).device == ("cpu", 0)


def test_the_fastest_variant_stands_in_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, target = tmp_path / "m.onnx", Target(threads=1)
    onnx.save(conv_model([1, 3, 8, 8], [4, 3, 3, 3]), path)
    samples = [Sample({"x": np.ones((1, 3, 8, 8), np.float32)})]
    assert tuned(path, samples, Settings(target=target), Phases()).target == target
    two, phases = (target, Target(threads=2)), Phases()
    monkeypatch.setattr(Target, "variants", lambda self: two)
    monkeypatch.setattr("onnx_lowrank.search.tuning.SECONDS", 0.1)
    assert tuned(path, samples, Settings(target=target), phases).target in two
    assert list(phases.seconds) == ["provider options"]


def test_latencies_of_different_gpus_and_options_are_never_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    targets, keys = [CUDA, *CUDA.variants()], set[str]()
    for names in ((), ("NVIDIA H100",), ("NVIDIA L4",)):
        cards = tuple(Card(f"GPU-{name}", name, "550.54") for name in names)
        monkeypatch.setattr("onnx_lowrank.latency.gpus._cards", lambda cards=cards: cards)
        Circumstances.here.cache_clear()
        keys |= {Circumstances.here(target).digest for target in targets}
    Circumstances.here.cache_clear()
    assert len(keys) == 3 * len(targets)


@pytest.mark.parametrize(
    ("said", "elem_type", "shape"),
    [("tensor(float)", TensorProto.FLOAT, (1, "n")), ("tensor(bfloat16)", TensorProto.BFLOAT16, (1, "n"))],
)
def test_signatures_in_onnxruntime_words(said: str, elem_type: int, shape: tuple[int | str, ...]) -> None:
    spec = parsed_spec("x", said, [1, "n"])
    assert (spec.elem_type, spec.shape) == (elem_type, shape)
    assert parsed_spec("x", "seq(tensor(float))", []).elem_type == TensorProto.UNDEFINED
