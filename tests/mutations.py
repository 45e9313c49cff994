"""Broken models: byte flips, truncations and splices of small valid ones, the same for the same seed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from builders import everything_model, model, value
from onnx import helper


def mutants(seed: int, count: int) -> Iterator[bytes]:
    """`count` files that may or may not be ONNX models."""
    rng = np.random.default_rng(seed)
    sources = _sources()
    for _ in range(count):
        data = bytearray(sources[rng.integers(len(sources))])
        match int(rng.integers(4)):
            case 0:
                for position in rng.integers(len(data), size=rng.integers(1, 9)):
                    data[position] ^= 1 << int(rng.integers(8))
            case 1:
                for position in rng.integers(len(data), size=rng.integers(1, 4)):
                    data[position] = int(rng.choice([0, 1, 127, 128, 255]))
            case 2:
                del data[int(rng.integers(len(data))) :]
            case _:
                other = sources[rng.integers(len(sources))]
                start, stop = sorted(rng.integers(len(other), size=2))
                place = int(rng.integers(len(data)))
                data[place : place + int(rng.integers(stop - start + 1))] = other[start:stop]
        yield bytes(data)


def _sources() -> list[bytes]:
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    conv = model(
        [
            helper.make_node("Conv", ["x", "w", "b"], ["c"], pads=[1, 1, 1, 1], name="conv"),
            helper.make_node("Relu", ["c"], ["r"]),
            helper.make_node("Conv", ["r", "v"], ["y"], strides=[2, 2]),
        ],
        [value("x", ["n", 3, 8, 8])],
        [value("y", ["n", 4, 4, 4])],
        {"w": weight(8, 3, 3, 3), "b": weight(8), "v": weight(4, 8, 1, 1)},
    )
    gemm = model(
        [
            helper.make_node("Flatten", ["x"], ["f"]),
            helper.make_node("Gemm", ["f", "w", "b"], ["h"], transB=1, alpha=0.5),
            helper.make_node("MatMul", ["h", "v"], ["m"]),
            helper.make_node("Reshape", ["m", "shape"], ["y"]),
        ],
        [value("x", ["n", 2, 6])],
        [value("y", ["n", 3, 2])],
        {"w": weight(10, 12), "b": weight(10), "v": weight(10, 6), "shape": np.array([-1, 3, 2], np.int64)},
        opset=13,
    )
    return [proto.SerializeToString() for proto in (conv, gemm, everything_model())]
