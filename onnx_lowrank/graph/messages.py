"""Copies and walks of protobuf messages that lose nothing, not even fields this ONNX release does not know."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TypeVar

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, TypeProto

AnyMessage = TypeVar("AnyMessage", bound=Message)


def husk(message: AnyMessage, without: Collection[str]) -> AnyMessage:
    """A copy of `message` that lacks the fields named in `without`; these are never copied, however large they are."""
    copy = type(message)()
    for descriptor, value in message.ListFields():
        if descriptor.name in without:
            continue
        if isinstance(value, Message):
            getattr(copy, descriptor.name).CopyFrom(value)
        elif isinstance(value, str | bytes | int | float):
            setattr(copy, descriptor.name, value)
        else:
            getattr(copy, descriptor.name).extend(value)
    copy.MergeFromString(_wire_format(UnknownFieldSet(message)))
    return copy


def bodies(node: NodeProto) -> Iterator[tuple[AttributeProto, int, GraphProto]]:
    """Every graph held by an attribute of `node`: (attribute, position among its graphs, graph)."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH and attribute.HasField("g"):
            yield attribute, 0, attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            for position, body in enumerate(attribute.graphs):
                yield attribute, position, body


def copy_node(node: NodeProto) -> NodeProto:
    """A copy of `node` in which every body is an empty graph."""
    if not any(True for _ in bodies(node)):
        copy = NodeProto()
        copy.CopyFrom(node)
        return copy
    copy = husk(node, {"attribute"})
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH and attribute.HasField("g"):
            copy.attribute.append(husk(attribute, {"g"}))
            copy.attribute[-1].g.SetInParent()
        elif attribute.type == AttributeProto.GRAPHS:
            copy.attribute.append(husk(attribute, {"graphs"}))
            for _ in attribute.graphs:
                copy.attribute[-1].graphs.add()
        else:
            copy.attribute.append(attribute)
    return copy


def not_text(message: Message, path: str = "model") -> str | None:
    """Path of the first string field that is not UTF-8, or None. Protobuf demands it, parsers do not enforce it."""
    for descriptor, value in message.ListFields():
        place = f"{path}.{descriptor.name}"
        if descriptor.message_type is not None:
            children = [value] if isinstance(value, Message) else value
            found = next(filter(None, (not_text(child, place) for child in children)), None)
            if found is not None:
                return found
        elif descriptor.type == descriptor.TYPE_STRING:
            texts = [value] if isinstance(value, str | bytes) else value
            if any(isinstance(text, bytes) for text in texts):
                return place
    return None


def unknown_type(message: Message) -> int | None:
    """The first element type of a declared value that this onnx release does not know, or None."""
    if isinstance(message, TypeProto.Tensor | TypeProto.SparseTensor):
        return None if message.elem_type in TensorProto.DataType.values() else message.elem_type
    for descriptor, value in message.ListFields():
        if descriptor.message_type is not None and not isinstance(value, TensorProto):
            children = [value] if isinstance(value, Message) else value
            found = next((kind for child in children if (kind := unknown_type(child)) is not None), None)
            if found is not None:
                return found
    return None


def tensors(message: Message) -> Iterator[TensorProto]:
    """Every tensor in `message`: in initializers, attributes, bodies, functions, training information."""
    if isinstance(message, TensorProto):
        yield message
        return
    for descriptor, value in message.ListFields():
        if descriptor.message_type is None:
            continue
        for child in (value,) if isinstance(value, Message) else value:
            yield from tensors(child)


def _wire_format(fields: UnknownFieldSet) -> bytes:
    """The bytes `fields` were parsed from: https://protobuf.dev/programming-guides/encoding ."""
    parts: list[bytes] = []
    for field in fields:
        number, kind, data = field.field_number, field.wire_type, field.data
        parts.append(_varint(number << 3 | kind))
        match kind:
            case 0:
                parts.append(_varint(data))
            case 1:
                parts.append(int(data).to_bytes(8, "little"))
            case 2:
                parts.extend((_varint(len(data)), data))
            case 3:
                parts.extend((_wire_format(data), _varint(number << 3 | 4)))
            case _:
                parts.append(int(data).to_bytes(4, "little"))
    return b"".join(parts)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
