"""A float32 twin of a model whose element types a provider cannot run: the same nodes, another width of numbers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, TypeProto, helper

from onnx_lowrank.graph.external import read_tensor
from onnx_lowrank.signature import Feeds

_REPLACED = frozenset({TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE})
# Attributes that hold an element type. A cast to another type, say int64, is left alone.
_TYPE_ATTRIBUTES = frozenset({"to", "dtype", "output_dtype", "stash_type"})


def fp32_twin(model: ModelProto, folder: Path | None = None) -> ModelProto:
    """A copy in which every fp16, bf16 and fp64 tensor is fp32: signature, weights, value_info, casts and bodies.

    Args:
        model: The original; weights in external files are read where they have to be converted.
        folder: Where relative external locations start.

    Returns:
        A model that takes float32 where the original took another floating type; it computes the same up to rounding.
    """
    twin = ModelProto()
    twin.CopyFrom(model)
    _convert_graph(twin.graph, folder)
    for function in twin.functions:
        _convert_nodes(function.node, folder)
    return twin


def fp32_feeds(feeds: Feeds) -> Feeds:
    """`feeds` in the types the twin takes."""
    kinds = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in feeds.items()}
    return {n: array.astype(np.float32) if kinds[n] in _REPLACED else array for n, array in feeds.items()}


def _convert_graph(graph: GraphProto, folder: Path | None) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info):
        _convert_type(value.type)
    for tensor in graph.initializer:
        _convert_tensor(tensor, folder)
    for sparse in graph.sparse_initializer:
        _convert_tensor(sparse.values, folder)
    _convert_nodes(graph.node, folder)


def _convert_nodes(nodes: Iterable[NodeProto], folder: Path | None) -> None:
    for node in nodes:
        for attribute in node.attribute:
            _convert_attribute(attribute, folder)


def _convert_attribute(attribute: AttributeProto, folder: Path | None) -> None:
    if attribute.type == AttributeProto.INT and attribute.name in _TYPE_ATTRIBUTES and attribute.i in _REPLACED:
        attribute.i = TensorProto.FLOAT
    if attribute.HasField("t"):
        _convert_tensor(attribute.t, folder)
    if attribute.HasField("tp"):
        _convert_type(attribute.tp)
    for tensor in attribute.tensors:
        _convert_tensor(tensor, folder)
    for body in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
        _convert_graph(body, folder)


def _convert_type(kind: TypeProto) -> None:
    match kind.WhichOneof("value"):
        case "tensor_type":
            if kind.tensor_type.elem_type in _REPLACED:
                kind.tensor_type.elem_type = TensorProto.FLOAT
        case "sparse_tensor_type":
            if kind.sparse_tensor_type.elem_type in _REPLACED:
                kind.sparse_tensor_type.elem_type = TensorProto.FLOAT
        case "sequence_type":
            _convert_type(kind.sequence_type.elem_type)
        case "optional_type":
            _convert_type(kind.optional_type.elem_type)
        case "map_type":
            _convert_type(kind.map_type.value_type)
        case _:
            pass


def _convert_tensor(tensor: TensorProto, folder: Path | None) -> None:
    if tensor.data_type not in _REPLACED:
        return
    array = read_tensor(tensor, folder).astype(np.float32)
    name, doc = tensor.name, tensor.doc_string
    tensor.CopyFrom(helper.make_tensor(name, TensorProto.FLOAT, array.shape, array.tobytes(), raw=True))
    tensor.doc_string = doc
