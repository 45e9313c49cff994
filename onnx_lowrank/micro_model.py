"""The model of one chain, with weights of no meaning, to be timed: lowered as the graph that is written will be."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from onnx_lowrank.chain import Chain
from onnx_lowrank.graph.tensor import make_tensor
from onnx_lowrank.layer import Form, Layer, LayerShape, Shape, Site
from onnx_lowrank.rewrite import flushed, lower, stage_tensor

TAIL_CHANNELS = 16
_MICRO_IR = 8


def chain_model(
    layer: Layer, chain: Chain | None, site: Site, *, elem_type: int | None = None, seed: int | None = 0
) -> ModelProto:
    """A model of one chain with made-up weights, its bias and the activation that follows, to be timed.

    Where the layer's output goes to a convolution, one follows here too, for layer and chain alike: of `TAIL_CHANNELS`
    outputs, kernel 1 and strides so long that it reads one position. It takes next to no time itself, but wants its
    input in the layout of convolutions, as the one behind the layer does, and nothing reorders a large output.

    Args:
        layer: The layer.
        chain: Its chain; None for the layer itself.
        site: Gives the input shape.
        elem_type: Element type to use instead of the layer's.
        seed: Of random weights, whose variance keeps activations at unit scale; None: every weight is the mean of its
            inputs, a model of the same latency that deflates to next to nothing.
    """
    form = layer.form
    kind = form.elem_type if elem_type is None else elem_type
    chain = chain or Chain.unfactored(layer.shape)
    rng = None if seed is None else np.random.default_rng(seed)
    tensors: list[TensorProto] = []
    for i, stage in enumerate(chain.stages):
        inputs = max(1, stage.params // (stage.groups * stage.out))
        if rng is None:
            factor = np.full(stage.weight, 1 / inputs, np.float32)
        else:
            factor = rng.standard_normal(stage.weight, dtype=np.float32) / np.float32(np.sqrt(inputs))
        tensors.append(make_tensor(f"w{i}", stage_tensor(form, stage, flushed(factor)[0]), kind))
    weights = [tensor.name for tensor in tensors]
    if form.bias:
        where = _bias_shape(form, layer.shape)
        tensors.append(make_tensor("bias", np.zeros(where) if rng is None else rng.standard_normal(where), kind))
    result = "h" if form.activation else "y"
    same_kind = replace(form, elem_type=kind)
    nodes = lower(same_kind, chain, "chain", "x", result, "bias" if form.bias else None, weights)
    if form.activation:
        nodes.extend(_activation(same_kind, result, "y"))
    last, size = "y", site.output_shape
    if site.before_conv:
        last, (batch, channels, *strides) = "z", size
        ones = (1,) * len(strides)
        nodes.append(helper.make_node("Conv", ["y", "tail"], ["z"], name="tail", strides=strides))
        tensors.append(make_tensor("tail", np.full((TAIL_CHANNELS, channels, *ones), 1 / channels), kind))
        size = (batch, TAIL_CHANNELS, *ones)
    graph = helper.make_graph(
        nodes,
        chain.method,
        [helper.make_tensor_value_info("x", kind, site.input_shape)],
        [helper.make_tensor_value_info(last, kind, size)],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", form.opset)], ir_version=_MICRO_IR)


def _bias_shape(form: Form, shape: LayerShape) -> Shape:
    return (shape.out, 1) if form.side == "left" else (shape.groups * shape.out,)


def _activation(form: Form, x: str, y: str) -> list[NodeProto]:
    """The operator that followed the layer."""
    if form.activation is None:
        return []
    op, pairs = form.activation
    numbers = dict(pairs)
    if op != "Clip" or form.opset < 11:
        node = helper.make_node(op, [x], [y], name="activation")
        node.attribute.extend(helper.make_attribute(name, number) for name, number in pairs)
        return [node]
    limits = [name if name in numbers else "" for name in ("min", "max")]
    constants = [
        helper.make_node("Constant", [], [name], value=make_tensor(name, np.array(numbers[name]), form.elem_type))
        for name in limits
        if name
    ]
    return [*constants, helper.make_node("Clip", [x, *limits], [y], name="activation")]
