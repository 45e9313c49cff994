"""A model above 2.2 GB: `python -m benchmarks.big_model big.onnx` writes a deep residual chain of MatMul.

x -> [x + Relu(x W_i) / depth] for i = 1..n. Every W_i is rank 64 plus noise, made from a few shared blocks by rolling
and scaling them, so that writing is as fast as the disk and no two weights are equal. The data go to disk one weight at
a time.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper

RANK = 64
NOISE = 0.02
POOL = 8


def write_big_model(path: Path, depth: int = 520, size: int = 1056, seed: int = 0) -> int:
    """Write the model and its external data; returns the size of the data in bytes.

    Args:
        path: The model; the data go to `<name>.data` beside it.
        depth: Number of MatMul.
        size: Rows and columns of each weight, fp32.
        seed: Of the random blocks.
    """
    rng = np.random.default_rng(seed)
    left = rng.standard_normal((POOL, size, RANK)).astype(np.float32) / np.float32(np.sqrt(RANK))
    right = rng.standard_normal((POOL, RANK, size)).astype(np.float32) / np.float32(np.sqrt(size / 2))
    noise = rng.standard_normal((POOL, size, size)).astype(np.float32) * np.float32(NOISE / np.sqrt(size))
    low = left @ right
    initializers: list[TensorProto] = []
    nodes: list[NodeProto] = []
    location = f"{path.name}.data"
    with path.with_name(location).open("wb") as data:
        for i in range(depth):
            weight = np.roll(low[i % POOL], i, axis=0) + np.roll(noise[(i // POOL) % POOL], i // POOL, axis=1)
            initializers.append(_reference(f"w{i}", weight, location, data.tell()))
            weight.tofile(data)
            nodes += _block(i, depth)
        end = data.tell()
    signature = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size]) for name in ("x0", f"x{depth}")]
    step = onnx.numpy_helper.from_array(np.array(1 / depth, np.float32), "step")
    graph = helper.make_graph(nodes, "big", signature[:1], signature[1:], [step, *initializers])
    model: ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString(deterministic=True))
    return end


def _block(i: int, depth: int) -> list[NodeProto]:
    """x{i} + Relu(x{i} w{i}) * step; every tenth block is plain, without the residual, to break the pattern."""
    nodes = [
        helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"m{i}"], name=f"layer{i}"),
        helper.make_node("Relu", [f"m{i}"], [f"r{i}"], name=f"relu{i}"),
    ]
    if i % 10 == 9 and i + 1 < depth:
        nodes[-1].output[0] = f"x{i + 1}"
        return nodes
    nodes.append(helper.make_node("Mul", [f"r{i}", "step"], [f"s{i}"], name=f"scale{i}"))
    nodes.append(helper.make_node("Add", [f"x{i}", f"s{i}"], [f"x{i + 1}"], name=f"residual{i}"))
    return nodes


def _reference(name: str, weight: np.ndarray, location: str, offset: int) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=weight.shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", weight.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def main() -> None:
    """Write the model named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--depth", type=int, default=520)
    parser.add_argument("--size", type=int, default=1056)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    size = write_big_model(arguments.path, arguments.depth, arguments.size)
    logging.getLogger(__name__).info("%s: %.2f GB of weights", arguments.path, size / 1e9)


if __name__ == "__main__":
    main()
