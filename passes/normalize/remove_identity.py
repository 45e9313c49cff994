"""Nodes that hand their input on unchanged: Identity, Dropout in inference, Cast to the type a tensor already has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnx import NodeProto, TensorProto

from onnx_lowrank.graph.scope import Scope
from onnx_lowrank.passes.normalize import constants
from onnx_lowrank.passes.normalize.node_rule import NodeRule, attribute, label
from onnx_lowrank.transform import Note


@dataclass(frozen=True)
class RemoveIdentity(NodeRule):
    """Remove Identity, Dropout in inference and Cast without effect; names of graph outputs stay."""

    name: ClassVar[str] = "remove_identity"

    def rewrite(self, scope: Scope, node: NodeProto) -> Note | None:
        """Remove `node` if it does nothing."""
        if not _does_nothing(scope, node) or any(node.output[1:]):
            return None
        source, result = node.input[0], node.output[0]
        producer = scope.producer(source)
        if result not in scope.outputs:
            scope.rename_input(result, source)
        elif producer is not None and scope.sole_consumer(source) is node:
            producer.output[list(producer.output).index(source)] = result
        else:
            return None  # two outputs, or an input and an output, need two names
        scope.remove(node)
        return Note(label(node), f"{node.op_type} {label(node)} removed: it does nothing")


def _does_nothing(scope: Scope, node: NodeProto) -> bool:
    match node.op_type:
        case "Identity":
            return True
        case "Dropout":
            training = node.input[2] if len(node.input) > 2 else ""
            array = scope.array(training) if training and constants.owner(scope, training) is not None else None
            return not training or (array is not None and not array.any())
        case "Cast":
            return attribute(node, "to", TensorProto.UNDEFINED) == _known_type(scope, node.input[0])
        case _:
            return False


def _known_type(scope: Scope, name: str) -> int | None:
    info = scope.value_info(name)
    if info is not None and info.type.HasField("tensor_type"):
        return info.type.tensor_type.elem_type
    return constants.elem_type(scope, name) or None
