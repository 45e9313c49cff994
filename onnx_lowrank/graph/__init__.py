"""The only reader and writer of ONNX files."""

from onnx_lowrank.graph.check import check, check_file, dims_of, inferred_shapes, skeleton
from onnx_lowrank.graph.external import read_tensor
from onnx_lowrank.graph.inline import inline_functions
from onnx_lowrank.graph.io import load, model_sha256, save
from onnx_lowrank.graph.model import Graph, Snapshot
from onnx_lowrank.graph.scope import Scope
from onnx_lowrank.graph.tensor import DEFAULT_DOMAINS, constant_tensor, make_tensor, tensor_bytes

__all__ = [
    "DEFAULT_DOMAINS",
    "Graph",
    "Scope",
    "Snapshot",
    "check",
    "check_file",
    "constant_tensor",
    "dims_of",
    "inferred_shapes",
    "inline_functions",
    "load",
    "make_tensor",
    "model_sha256",
    "read_tensor",
    "save",
    "skeleton",
    "tensor_bytes",
]
