"""Arithmetic on constants in front of a weight or a folding candidate is done once, here, not at every run.

Only what leads into a weight-bearing node, a BatchNormalization or an elementwise operator is folded, with
`onnx.reference` (exact, in the tensors' own types). A tensor above `copy_limit` elements is folded only where no other
node reads what it is made of: a tied embedding is not stored twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper
from onnx.reference import ReferenceEvaluator

from onnx_lowrank.graph.scope import Scope
from onnx_lowrank.graph.tensor import DEFAULT_DOMAINS, make_tensor
from onnx_lowrank.passes.normalize import constants
from onnx_lowrank.passes.normalize.node_rule import NodeRule, label
from onnx_lowrank.transform import Note

SHAPING = {"Identity", "Cast", "Transpose", "Unsqueeze", "Squeeze", "Reshape", "Flatten", "Expand", "Concat", "Slice"}
ARITHMETIC = {"Mul", "Add", "Sub", "Div", "Sqrt", "Neg", "Reciprocal", "Pow", "Exp"}
WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "LSTM", "GRU", "BatchNormalization"}
ROOTS = WEIGHTED | {"Mul", "Add", "Sub", "Div", "Clip", "Min", "Max"}
FOLDABLE = SHAPING | ARITHMETIC


@dataclass(frozen=True)
class FoldConstants(NodeRule):
    """Replace arithmetic on constants in front of weights by its result.

    Args:
        max_elements: Largest result that is stored.
        copy_limit: Largest result that is stored although other nodes keep reading the constants it is made of.
    """

    name: ClassVar[str] = "fold_constants"
    max_elements: int = 1 << 26
    copy_limit: int = 1 << 14

    def rewrite(self, scope: Scope, node: NodeProto) -> Note | None:
        """Replace `node` by its value if all its inputs are constant."""
        if node.op_type not in FOLDABLE or len(node.output) != 1 or node.output[0] in scope.outputs:
            return None
        if not _leads_to_root(scope, node.output[0]):
            return None
        sources = list(dict.fromkeys(name for name in node.input if name))
        if not sources or any(constants.owner(scope, name) is None for name in sources):
            return None
        tensors = [scope.constant_source(name) for name in sources]
        size = max((math.prod(tensor.dims) for tensor in tensors if tensor is not None), default=0)
        alone = all(constants.used_once(scope, name) for name in sources)
        if size > (self.max_elements if alone else self.copy_limit):
            return None
        arrays = {name: array for name in sources if (array := scope.array(name)) is not None}
        result = _evaluate(node, arrays, scope.graph.opset)
        if result.size > max(size, self.copy_limit):
            return None
        name = node.output[0]
        kind = _element_type(scope, node)
        scope.remove(node)
        scope.initializers[name] = make_tensor(name, result, kind)
        scope.graph.hide_initializers()
        return Note(label(node), f"{node.op_type} {label(node)} of constants replaced by its value")


def _leads_to_root(scope: Scope, name: str) -> bool:
    """Whether a chain of foldable operators leads from `name` to an operator worth it."""
    seen, queue = {name}, [name]
    while queue:
        for user in scope.consumers(queue.pop()):
            if user.domain not in DEFAULT_DOMAINS:
                continue
            if user.op_type in ROOTS:
                return True
            if user.op_type in FOLDABLE:
                fresh = set(user.output) - seen
                seen |= fresh
                queue.extend(fresh)
    return False


def _element_type(scope: Scope, node: NodeProto) -> int:
    if node.op_type == "Cast":
        return next(item.i for item in node.attribute if item.name == "to")
    return constants.elem_type(scope, node.input[0])


def _evaluate(node: NodeProto, arrays: dict[str, NDArray[np.generic]], opset: int) -> NDArray[np.generic]:
    values: list[ValueInfoProto] = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in arrays.items()
    ]
    output = helper.make_tensor_value_info(node.output[0], TensorProto.UNDEFINED, None)
    graph: GraphProto = helper.make_graph([node], "constant", values, [output])
    model: ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    result = ReferenceEvaluator(model).run([node.output[0]], dict(arrays))
    return np.asarray(next(iter(result)))
