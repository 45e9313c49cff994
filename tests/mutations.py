"""Broken models: byte flips, truncations, splices and wrong fields of small valid ones, the same for the same seed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from builders import everything_model, model, value
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from onnx import ModelProto, TensorProto, helper, numpy_helper


def mutants(seed: int, count: int) -> Iterator[bytes]:
    """`count` files that may or may not be ONNX models."""
    rng = np.random.default_rng(seed)
    sources = _sources()
    for _ in range(count):
        data = bytearray(sources[rng.integers(len(sources))])
        match int(rng.integers(6)):
            case 0:
                for position in rng.integers(len(data), size=rng.integers(1, 9)):
                    data[position] ^= 1 << int(rng.integers(8))
            case 1:
                for position in rng.integers(len(data), size=rng.integers(1, 4)):
                    data[position] = int(rng.choice([0, 1, 127, 128, 255]))
            case 2:
                del data[int(rng.integers(len(data))) :]
            case 3:
                other = sources[rng.integers(len(sources))]
                start, stop = sorted(rng.integers(len(other), size=2))
                place = int(rng.integers(len(data)))
                data[place : place + int(rng.integers(stop - start + 1))] = other[start:stop]
            case _:
                proto = ModelProto.FromString(bytes(data))
                for _ in range(int(rng.integers(1, 3))):
                    _change(proto, rng)
                data = bytearray(proto.SerializeToString())
        yield bytes(data)


def _change(proto: ModelProto, rng: np.random.Generator) -> None:
    """Give one field somewhere in the message another value, or drop, double or move one of its entries."""
    places = list(_fields(proto))
    message, field = places[rng.integers(len(places))]
    held = getattr(message, field.name)
    if isinstance(held, Message):
        message.ClearField(field.name)
    elif field.enum_type is not None:
        setattr(message, field.name, field.enum_type.values[int(rng.integers(len(field.enum_type.values)))].number)
    elif isinstance(held, str | bytes | int | float):
        setattr(message, field.name, _other(held, proto, rng))
    else:
        entries = list(held)
        at, to = rng.integers(len(entries), size=2)
        match int(rng.integers(4)):
            case 0:
                del entries[at]
            case 1:
                entries.insert(to, entries[at])
            case 2:
                entries[at], entries[to] = entries[to], entries[at]
            case _ if not isinstance(entries[at], Message):
                entries[at] = _other(entries[at], proto, rng)
            case _:
                entries.clear()
        message.ClearField(field.name)
        getattr(message, field.name).extend(entries)


def _other(value: Any, proto: ModelProto, rng: np.random.Generator) -> Any:
    match value:
        case str():
            texts = [getattr(m, f.name) for m, f in _fields(proto) if isinstance(getattr(m, f.name), str)]
            return str(rng.choice(["", "MatMul", "Conv", "Identity", "Loop", *texts]))
        case bytes():
            return value[: rng.integers(len(value))] if value else b"\0"
        case float():
            return float(rng.choice([0.0, -1.0, np.nan, np.inf, 1e38, 1e-45]))
        case _:
            return int(rng.choice([0, 1, 2, 3, 7, 10, 16, 1000, value + 1, max(value - 1, 0), (1 << 31) - 1]))


def _fields(message: Message) -> Iterator[tuple[Message, FieldDescriptor]]:
    """Every field that is set, in this message and all it holds."""
    for field, held in message.ListFields():
        yield message, field
        if field.message_type is not None:
            for child in (held,) if isinstance(held, Message) else held:
                yield from _fields(child)


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
    branches = [
        helper.make_graph([helper.make_node("MatMul", ["t", name], ["z"])], op, [], [value("z", ["n", 4, 8])])
        for op, name in (("then", "one"), ("else", "two"))
    ]
    nested = model(
        [
            helper.make_node("BatchNormalization", ["x", "scale", "shift", "mean", "variance"], ["g"]),
            helper.make_node("Transpose", ["g"], ["t"], perm=[0, 2, 1]),
            helper.make_node("ReduceMax", ["x"], ["top"], keepdims=0),
            helper.make_node("Cast", ["top"], ["yes"], to=TensorProto.BOOL),
            helper.make_node("If", ["yes"], ["z"], then_branch=branches[0], else_branch=branches[1]),
            helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(weight(8), "k")),
            helper.make_node("Add", ["z", "k"], ["y"]),
        ],
        [value("x", ["n", 6, 4])],
        [value("y", ["n", 4, 8])],
        {
            **{name: weight(6) for name in ("scale", "shift", "mean")},
            "variance": np.abs(weight(6)) + 1,
            **{name: weight(6, 8) for name in ("one", "two")},
        },
        opset=15,
    )
    return [proto.SerializeToString() for proto in (conv, gemm, nested, everything_model())]
