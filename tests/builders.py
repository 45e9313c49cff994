"""Small ONNX models that tests build in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from onnx_lowrank.graph import Graph
from onnx_lowrank.pass_manager import PassManager
from onnx_lowrank.transform import Pass

RNG = np.random.default_rng(0)


def value(name: str, shape: Sequence[int | str], elem_type: int = TensorProto.FLOAT) -> ValueInfoProto:
    """A tensor value of a signature; a string is a symbolic dimension."""
    return helper.make_tensor_value_info(name, elem_type, shape)


def model(
    nodes: Sequence[NodeProto],
    inputs: Sequence[ValueInfoProto],
    outputs: Sequence[ValueInfoProto],
    weights: Mapping[str, NDArray[np.generic]] | None = None,
    opset: int = 17,
    ir_version: int = 8,
) -> ModelProto:
    """A checked model of the default domain."""
    tensors = [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
    graph = helper.make_graph(list(nodes), "test", list(inputs), list(outputs), tensors)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def conv_model(
    x: Sequence[int | str],
    weight: Sequence[int],
    *,
    bias: bool = True,
    opset: int = 17,
    elem_type: int = TensorProto.FLOAT,
    **attributes: Any,
) -> ModelProto:
    """One Conv named "conv", x -> y."""
    dtype = helper.tensor_dtype_to_np_dtype(elem_type)
    tensors: dict[str, NDArray[np.generic]] = {"w": RNG.standard_normal(weight).astype(dtype)}
    if bias:
        tensors["b"] = RNG.standard_normal(weight[0]).astype(dtype)
    node = helper.make_node("Conv", ["x", *tensors], ["y"], name="conv", **attributes)
    y = value("y", [None] * len(x), elem_type)  # pyright: ignore[reportArgumentType] - None is an unknown dimension
    return model([node], [value("x", x, elem_type)], [y], tensors, opset)


def product_model(
    op: str,
    x: Sequence[int | str],
    weight: Sequence[int],
    *,
    left: bool = False,
    c: Sequence[int] | None = None,
    opset: int = 17,
    **attributes: Any,
) -> ModelProto:
    """One Gemm or MatMul named "product" with a constant on the right (or left) and an optional C, x -> y."""
    tensors: dict[str, NDArray[np.generic]] = {"w": RNG.standard_normal(weight).astype(np.float32)}
    if c is not None:
        tensors["c"] = RNG.standard_normal(c).astype(np.float32)
    operands = ["w", "x"] if left else ["x", "w"]
    node = helper.make_node(op, operands + (["c"] if c is not None else []), ["y"], name="product", **attributes)
    a, b = (weight, x) if left else (x, weight)
    rank = 2 if op == "Gemm" else max(len(a), len(b)) - (min(len(a), len(b)) == 1)
    y = value("y", [None] * rank)  # pyright: ignore[reportArgumentType] - None is an unknown dimension
    return model([node], [value("x", x)], [y], tensors, opset)


def differences(a: Message, b: Message, path: str = "model") -> list[str]:
    """Where two messages differ, field by field, unknown fields included; empty if they are the same."""
    found: list[str] = []
    ours, theirs = ({d.name: value for d, value in message.ListFields()} for message in (a, b))
    for name in sorted(ours.keys() | theirs.keys()):
        place = f"{path}.{name}"
        if name not in ours or name not in theirs:
            found.append(f"{place} only in the {'first' if name in ours else 'second'}")
        elif isinstance(ours[name], Message):
            found += differences(ours[name], theirs[name], place)
        elif isinstance(ours[name], str | bytes | int | float):
            # repr: a NaN equals itself
            found += [place] if repr(ours[name]) != repr(theirs[name]) else []
        elif len(ours[name]) != len(theirs[name]):
            found.append(f"{place}: {len(ours[name])} and {len(theirs[name])} entries")
        elif len(ours[name]) and isinstance(ours[name][0], Message):
            for i, (x, y) in enumerate(zip(ours[name], theirs[name], strict=True)):
                found += differences(x, y, f"{place}[{i}]")
        elif repr(list(ours[name])) != repr(list(theirs[name])):
            found.append(place)
    unknown = [[(f.field_number, f.wire_type, f.data) for f in UnknownFieldSet(message)] for message in (a, b)]
    return found if unknown[0] == unknown[1] else [*found, f"{path}: unknown fields"]


def everything_model() -> ModelProto:
    """A valid model that uses every corner of the format, unknown fields included."""
    big = np.random.default_rng(3).standard_normal((20, 20)).astype(np.float32)
    square = helper.make_function(
        "local", "Square", ["a"], ["b"], [helper.make_node("Mul", ["a", "a"], ["b"])], [helper.make_opsetid("", 17)]
    )
    shift = [numpy_helper.from_array(big[0], "shift")]
    branches = [
        helper.make_graph([helper.make_node(op, ["h", "shift"], ["r"])], op, [], [value("r", ["rows", 20])], shift)
        for op in ("Add", "Sub")
    ]
    nodes = [
        helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(big + 1, "k_value"), name="constant"),
        helper.make_node("MatMul", ["x", "w"], ["m"], name="matmul", doc_string="the weight"),
        helper.make_node("Add", ["m", "k_sum"], ["g"]),
        helper.make_node("Square", ["g"], ["h"], domain="local"),
        helper.make_node("If", ["c"], ["i"], name="choice", then_branch=branches[0], else_branch=branches[1]),
        helper.make_node("Frobnicate", ["i", "s"], ["f"], domain="com.example", strength=0.5),
        helper.make_node("Identity", ["i"], ["y"]),
    ]
    nodes.insert(1, helper.make_node("ReduceSum", ["k"], ["k_sum"], keepdims=0))
    inputs = [value("x", ["batch", 20]), value("c", [], TensorProto.BOOL), value("w", [20, 20])]
    outputs = [value("y", ["batch", 20]), value("f", ["batch", 20])]
    graph = helper.make_graph(nodes, "everything", inputs, outputs, [numpy_helper.from_array(big, "w")], "a graph")
    sparse = helper.make_sparse_tensor(
        helper.make_tensor("s", TensorProto.FLOAT, [2], [1.0, 2.0]),
        helper.make_tensor("", TensorProto.INT64, [2], [3, 5]),
        [8],
    )
    graph.sparse_initializer.append(sparse)
    graph.value_info.append(value("m", ["batch", 20]))
    graph.quantization_annotation.add(tensor_name="w").quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="w")
    graph.metadata_props.add(key="graph", value="kept")
    graph.initializer[0].metadata_props.add(key="tensor", value="kept")
    graph.node[2].metadata_props.add(key="node", value="kept")
    imports = [helper.make_opsetid(*pair) for pair in (("", 17), ("local", 1), ("com.example", 3))]
    proto = helper.make_model(graph, opset_imports=imports, functions=[square], ir_version=10, producer_name="test")
    proto.doc_string, proto.domain, proto.model_version, proto.producer_version = "a model", "org.test", 7, "1.2"
    proto.metadata_props.add(key="characters", value="äöü")
    proto.training_info.add().algorithm.CopyFrom(helper.make_graph([], "algorithm", [], []))
    varint, sixty_four, text, thirty_two = b"\x80\x7d\x05", b"\x89\x7d12345678", b"\x92\x7d\x03abc", b"\x9d\x7d1234"
    for message in (proto, proto.graph, proto.graph.node[2], proto.graph.node[5].attribute[0].g):
        message.MergeFromString(varint + sixty_four + text + thirty_two)
    return proto


def run_model(proto: ModelProto, feeds: Mapping[str, NDArray[np.generic]]) -> list[NDArray[np.float64]]:
    """Outputs of a model on onnxruntime's CPU provider, in float64."""
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return [np.asarray(array, np.float64) for array in session.run(None, dict(feeds))]


def worst_error(expected: Sequence[NDArray[np.float64]], got: Sequence[NDArray[np.float64]]) -> float:
    """Largest relative L2 distance over all outputs."""
    return max(float(np.linalg.norm(a - b) / (np.linalg.norm(a) or 1.0)) for a, b in zip(expected, got, strict=True))


def apply_passes(proto: ModelProto, *passes: Pass) -> tuple[ModelProto, list[str]]:
    """The model after `passes`, run under the pass manager, and the text of their notes."""
    graph = Graph(proto)
    records = PassManager(passes).run(graph)
    return graph.to_proto(), [note.text for record in records for note in record.notes]


def op_types(proto: ModelProto) -> list[str]:
    """Operators of the main graph, in order."""
    return [node.op_type for node in proto.graph.node]
