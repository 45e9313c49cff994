"""Small models that are worth factoring, as files: what the tests of the whole road drive on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from builders import model, value
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, shape_inference

from onnx_lowrank.goals import DEFAULT_GOAL, Goal
from onnx_lowrank.pipeline import optimize
from onnx_lowrank.plan import Plan
from onnx_lowrank.report.model import Report
from onnx_lowrank.settings import Settings
from onnx_lowrank.target import InputShapes, Target

WEIGHT_BEARING = {"Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "LSTM", "GRU"}


def on_one_thread(goal: Goal = DEFAULT_GOAL, *, shapes: Sequence[InputShapes] = (), **options: Any) -> Settings:
    """Settings for a quick, steady run."""
    return Settings(goal, Target(threads=1, shapes=tuple(shapes)), **options)


def low_rank(shape: Sequence[int], rank: int, seed: int, noise: float = 0.01) -> NDArray[np.float32]:
    """A weight whose first-axis unfolding has about `rank`, scaled to keep activations at unit size."""
    rng = np.random.default_rng(seed)
    columns = math.prod(shape[1:])
    product = rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, columns)) / math.sqrt(rank)
    noisy = product + noise * rng.standard_normal((shape[0], columns))
    return (noisy * math.sqrt(2 / columns)).reshape(shape).astype(np.float32)


def node(op: str, inputs: str, output: str, name: str = "", **attributes: Any) -> NodeProto:
    """A node; inputs in one string."""
    return helper.make_node(op, inputs.split(), [output], name=name, **attributes)


def network(width: int = 64) -> ModelProto:
    """image (batch, 3, 16, 16) -> logits (batch, 10): three convolutions, one depthwise, a head, two of activations."""
    weights = {
        "w0": low_rank((width // 2, 3, 3, 3), 3, 0),
        "b0": np.full(width // 2, 0.1, np.float32),
        "w1": low_rank((width, width // 2, 3, 3), 8, 1),
        "w2": low_rank((width, width, 3, 3), 8, 2),
        "wd": low_rank((width, 1, 3, 3), 1, 3),
        "f": np.ascontiguousarray(low_rank((10, width), 4, 4).T),
    }
    nodes = [
        node("Conv", "image w0 b0", "a0", "stem", pads=[1] * 4),
        node("Relu", "a0", "h0"),
        node("Conv", "h0 w1", "a1", "body/1", pads=[1] * 4, strides=[2, 2]),
        node("Relu", "a1", "h1"),
        node("Conv", "h1 w2", "a2", "body/2", pads=[1] * 4),
        node("Relu", "a2", "h2"),
        node("Conv", "h2 wd", "a3", "depthwise", pads=[1] * 4, group=width),
        node("GlobalAveragePool", "a3", "p"),
        node("Flatten", "p", "q"),
        node("MatMul", "q f", "logits", "head"),
        node("Transpose", "logits", "t"),
        node("MatMul", "logits t", "similarity", "gram"),
    ]
    outputs = [value("logits", ["batch", 10]), value("similarity", ["batch", "batch"])]
    return model(nodes, [value("image", ["batch", 3, 16, 16])], outputs, weights)


def perceptron(elem_type: int = TensorProto.FLOAT, width: int = 128) -> ModelProto:
    """x (rows, width) -> y (rows, width) through two MatMul, in any floating type."""
    dtype = helper.tensor_dtype_to_np_dtype(elem_type)
    weights = {name: low_rank((width, width), 6, seed).astype(dtype) for seed, name in enumerate(("w0", "w1"))}
    nodes = [node("MatMul", "x w0", "h", "first"), node("MatMul", "h w1", "y", "second")]
    signature = [value(name, ["rows", width], elem_type) for name in ("x", "y")]
    return model(nodes, signature[:1], signature[1:], weights)


def bodies() -> ModelProto:
    """A MatMul in each branch of an If, and one in the body of a Loop of three turns."""
    width = 96
    names = ("then", "else", "loop")
    weights = {f"w_{name}": low_rank((width, width), 4, seed) for seed, name in enumerate(names)}
    branches = [
        helper.make_graph(
            [node("MatMul", f"x w_{name}", f"r_{name}", name)], name, [], [value(f"r_{name}", ["rows", width])]
        )
        for name in ("then", "else")
    ]
    body = helper.make_graph(
        [node("Identity", "going", "still"), node("MatMul", "state w_loop", "next", "step")],
        "body",
        [
            value("turn", [], TensorProto.INT64),
            value("going", [], TensorProto.BOOL),
            value("state", ["rows", width]),
        ],
        [value("still", [], TensorProto.BOOL), value("next", ["rows", width])],
    )
    nodes = [
        node("If", "flag", "i", "choice", then_branch=branches[0], else_branch=branches[1]),
        node("Loop", "turns yes i", "y", "repeat", body=body),
    ]
    constants = {"turns": np.array(3), "yes": np.array(True)}
    inputs = [value("x", ["rows", width]), value("flag", [], TensorProto.BOOL)]
    return model(nodes, inputs, [value("y", ["rows", width])], weights | constants)


def shared() -> ModelProto:
    """One weight read by three nodes, a second weight by one."""
    weights = {"w": low_rank((96, 96), 4, 0), "v": low_rank((96, 96), 4, 1)}
    nodes = [
        node("MatMul", "x w", "a", "one"),
        node("MatMul", "a w", "b", "two"),
        node("MatMul", "b v", "c", "other"),
        node("MatMul", "c w", "y", "three"),
    ]
    return model(nodes, [value("x", ["rows", 96])], [value("y", ["rows", 96])], weights)


def save(proto: ModelProto, folder: Path, name: str = "model.onnx") -> Path:
    """The model as a file."""
    onnx.save(proto, folder / name)
    return folder / name


def save_external(proto: ModelProto, folder: Path) -> Path:
    """The model with its weights in a file beside it."""
    copy = ModelProto()
    copy.CopyFrom(proto)
    path = folder / "external.onnx"
    onnx.save(copy, path, save_as_external_data=True, location="weights.bin", size_threshold=64)
    return path


def weight_bearing(proto: ModelProto) -> list[str]:
    """Names of the weight-bearing nodes of the main graph."""
    return [n.name for n in proto.graph.node if n.op_type in WEIGHT_BEARING]


def parameter_count(proto: ModelProto) -> int:
    """Elements of all initializers of real numbers."""
    arrays = [numpy_helper.to_array(tensor) for tensor in proto.graph.initializer]
    return sum(array.size for array in arrays if array.dtype.kind not in "biu")


@dataclass(frozen=True, eq=False)
class Ride:
    """One trip down the road."""

    source: Path
    out: Path
    report: Report
    plan: Plan

    @property
    def result(self) -> ModelProto:
        """The model that was written."""
        return onnx.load(self.out)


def ride(proto: ModelProto, folder: Path, settings: Settings, *, external: bool = False) -> Ride:
    """Optimize a model in a folder."""
    source = save_external(proto, folder) if external else save(proto, folder)
    out = folder / "out.onnx"
    return Ride(source, out, *optimize(source, out, settings))


def macs(proto: ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> float:
    """Multiply-accumulates of Conv and MatMul, from inferred shapes alone."""
    fixed = ModelProto()
    fixed.CopyFrom(proto)
    for given in fixed.graph.input:
        for dim, size in zip(given.type.tensor_type.shape.dim, shapes[given.name], strict=True):
            dim.dim_value = size
    del fixed.graph.value_info[:]
    for result in fixed.graph.output:
        result.type.tensor_type.ClearField("shape")
    inferred = shape_inference.infer_shapes(fixed, data_prop=True).graph
    known = {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*inferred.value_info, *inferred.output)
    }
    known |= {name: list(shape) for name, shape in shapes.items()}
    known |= {tensor.name: list(tensor.dims) for tensor in proto.graph.initializer}
    total = 0.0
    for n in proto.graph.node:
        if n.op_type == "Conv":
            total += math.prod(known[n.output[0]]) * math.prod(known[n.input[1]][1:])
        elif n.op_type == "MatMul":
            total += math.prod(known[n.output[0]]) * known[n.input[0]][-1]
    return total
