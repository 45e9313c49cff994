"""Is the model valid? The checker and shape inference on a skeleton without weights, so that size does not matter.

In the skeleton every constant of more than 1 KiB is an input of the same type and shape: the checker needs neither its
data nor a file, and what shape inference looks up (the shapes of Reshape, the scales of Resize) is far smaller.

Many exporters write models that strict shape inference rejects and every runtime accepts. What it finds in the model as
read is remembered in `Graph.tolerated`; from then on only findings that are not among these are errors. The checker
itself, which looks at structure, attributes and operator signatures, is never tolerated. Operators of domains ONNX does
not know are not looked at; whatever depends on their output has unknown shape.
"""

from __future__ import annotations

import re
from pathlib import Path

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto
from onnx.checker import ValidationError
from onnx.shape_inference import InferenceError

from onnx_lowrank.errors import InputError, InvalidResultError
from onnx_lowrank.graph.external import is_external, with_raw_data
from onnx_lowrank.graph.messages import bodies
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.graph.tensor import DEFAULT_DOMAINS, constant_tensor, tensor_bytes

SMALL = 1024
Dims = tuple[int | str | None, ...]


def check(graph: Graph) -> None:
    """Raise if the graph is not valid ONNX: checker, then strict shape and type inference.

    Raises:
        InvalidResultError: with the first thing found that is not in `graph.tolerated`.
    """
    model = skeleton(graph)
    found = structure_error(model)
    if found is None:
        found = _first_new(inference_errors(model), graph.tolerated)
    if found is not None:
        raise InvalidResultError(
            f"an invalid graph: {found}", "a graph the ONNX checker accepts", "report this as a bug"
        )


def check_file(path: Path, tolerated: frozenset[str] = frozenset()) -> None:
    """Raise if the finished file at `path`, external data included, is not valid ONNX. Works above 2 GB.

    Raises:
        InvalidResultError: with the first thing found that is not in `tolerated`.
    """
    from onnx_lowrank.graph.io import load  # noqa: PLC0415 - loading checks: the two modules need each other

    try:
        onnx.checker.check_model(str(path))
        found = _first_new(load(path).tolerated, tolerated)
    except (ValidationError, InputError) as error:
        found = first_line(error)
    if found is not None:
        raise InvalidResultError(f"{path}: {found}", "a file the ONNX checker accepts", "report this as a bug")


def structure_error(model: ModelProto) -> str | None:
    """First line of what the checker has against `model`, or why shape inference cannot run, or None."""
    try:
        onnx.checker.check_model(model)
        onnx.shape_inference.infer_shapes(model, data_prop=True)
    except (ValidationError, InferenceError, ValueError, RuntimeError) as error:
        return first_line(error)
    return None


def inference_errors(model: ModelProto) -> frozenset[str]:
    """Everything strict shape and type inference has against `model`, one line for each node."""
    try:
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except (InferenceError, ValidationError, ValueError, RuntimeError) as error:
        text = re.sub(r"^\[\w+\] Inference error\(s\):\s*", "", str(error))
        return frozenset(" ".join(finding.split()) for finding in re.split(r"\n(?=\(op_type:)", text))
    return frozenset()


def _first_new(findings: frozenset[str], tolerated: frozenset[str]) -> str | None:
    """The first finding that is not among the tolerated ones, wherever in the graph: a rewrite renames nodes."""
    known = {_without_place(finding) for finding in tolerated}
    return min((finding for finding in findings if _without_place(finding) not in known), default=None)


def _without_place(finding: str) -> str:
    return re.sub(r"\(op_type:.*?\): (?=\[)", "", finding)


def inferred_shapes(graph: Graph, input_shapes: dict[str, tuple[int, ...]] | None = None) -> dict[str, Dims]:
    """Shape of every tensor that inference can tell, values of shape-like tensors being followed too.

    Args:
        graph: Any valid graph.
        input_shapes: Fixed shapes of inputs; a symbol bound by one of them is bound in the other inputs as well.

    Returns:
        Tensor name to dimensions: a number, a symbol or None. Names in bodies carry the scope's path in front.

    Raises:
        InputError: if `input_shapes` names no input, or contradicts its declared shape.
    """
    model = skeleton(graph)
    _forget_shapes(model.graph)
    _fix_inputs(model.graph, [value.name for value in graph.feeds], input_shapes or {})
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    shapes: dict[str, Dims] = {}
    for scope, result in zip(graph.scopes(), Graph(inferred).scopes(), strict=True):
        for value in (*result.proto.input, *result.proto.value_info, *result.proto.output):
            if value.type.tensor_type.HasField("shape"):
                shapes[scope.path + value.name] = dims_of(value)
        for name, tensor in scope.initializers.items():
            shapes[scope.path + name] = tuple(tensor.dims)
    return shapes


def dims_of(value: ValueInfoProto) -> Dims:
    """Dimensions of a tensor value: numbers, symbols, or None where nothing is said."""
    return tuple(
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None
        for dim in value.type.tensor_type.shape.dim
    )


def skeleton(graph: Graph) -> ModelProto:
    """The model with every constant of more than 1 KiB turned into a formal input of the main graph.

    Initializers of the main graph become inputs under their own names. Constants in bodies and Constant nodes become
    Identity nodes that read a new input, so that no name changes.
    """
    large: list[TensorProto] = []

    def stub(tensor: TensorProto) -> TensorProto:
        if tensor_bytes(tensor) > SMALL:
            large.append(tensor)
            return TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, doc_string=_STUB)
        if is_external(tensor):
            return with_raw_data(tensor, onnx.numpy_helper.from_array(graph.array(tensor)).raw_data)
        return tensor

    model = graph.to_proto(stub)
    listed = {value.name for value in model.graph.input}
    for tensor in _take_stubs(model.graph):
        if tensor.name not in listed:
            model.graph.input.append(_as_input(tensor.name, tensor))
    _hoist_constants(model.graph, model.graph)
    return model


def first_line(error: Exception) -> str:
    """The first sentence of an exception's message: a line that ends with a colon goes on in the next."""
    text = re.sub(r":\s*\n\s*", ": ", str(error).strip())
    return text.partition("\n")[0].strip() or type(error).__name__


_STUB = "\0stub"


def _take_stubs(graph: GraphProto) -> list[TensorProto]:
    """Remove the stubs among the initializers of `graph` and return them."""
    stubs = [tensor for tensor in graph.initializer if tensor.doc_string == _STUB]
    kept = [tensor for tensor in graph.initializer if tensor.doc_string != _STUB]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return stubs


def _hoist_constants(scope: GraphProto, main: GraphProto) -> None:
    """Turn large Constant nodes of `scope`, and what is large in the bodies below it, into inputs of `main`."""
    for node in scope.node:
        constant = constant_tensor(node) if len(node.attribute) == len(node.output) == 1 else None
        if constant is not None and (is_external(constant) or tensor_bytes(constant) > SMALL):
            node.CopyFrom(_identity(constant, node.output[0], main))
        for _, _, body in bodies(node):
            stubs = _take_stubs(body)
            nodes = [_identity(tensor, tensor.name, main) for tensor in stubs] + list(body.node)
            if stubs:
                del body.node[:]
                body.node.extend(nodes)
            _hoist_constants(body, main)


def _identity(tensor: TensorProto, output: str, main: GraphProto) -> NodeProto:
    name = f"hoisted constant {len(main.input)}"
    main.input.append(_as_input(name, tensor))
    return NodeProto(op_type="Identity", name=name, input=[name], output=[output])


def _as_input(name: str, tensor: TensorProto) -> ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims))


def _forget_shapes(scope: GraphProto) -> None:
    """Drop declared shapes that inference will find again; they may have been written for another input shape."""
    unknown = {name for node in scope.node if node.domain not in DEFAULT_DOMAINS for name in node.output}
    kept = [value for value in scope.value_info if value.name in unknown]
    del scope.value_info[:]
    scope.value_info.extend(kept)
    for value in scope.output:
        if value.name not in unknown:
            value.type.tensor_type.ClearField("shape")
    for node in scope.node:
        for _, _, body in bodies(node):
            _forget_shapes(body)


def _fix_inputs(main: GraphProto, feeds: list[str], shapes: dict[str, tuple[int, ...]]) -> None:
    values = {value.name: value for value in main.input if value.name in feeds}
    bound: dict[str, int] = {}
    for name, shape in shapes.items():
        if name not in values:
            raise InputError(f"a shape for {name!r}", f"one of the inputs {feeds}", "check the name")
        value = values[name]
        declared = dims_of(value)
        known = value.type.tensor_type.HasField("shape")
        if known and (
            len(declared) != len(shape)
            or any(isinstance(d, int) and d != s for d, s in zip(declared, shape, strict=True))
        ):
            raise InputError(f"shape {list(shape)} for input {name!r}", f"{list(declared)}", "give a shape that fits")
        bound.update({d: s for d, s in zip(declared, shape, strict=False) if isinstance(d, str)})
        value.CopyFrom(onnx.helper.make_tensor_value_info(name, value.type.tensor_type.elem_type, list(shape)))
    for value in values.values():
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in bound:
                dim.dim_value = bound[dim.dim_param]
