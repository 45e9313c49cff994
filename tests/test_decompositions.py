"""The contract of every decomposition in the folder: a new file gets these tests without asking for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from builders import conv_model, product_model
from chains import outputs, relative_error
from formats import EVERY
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, numpy_helper

from onnx_lowrank.chain import Fit, Folded, Stage
from onnx_lowrank.decomposition import Decomposition, Rank
from onnx_lowrank.graph.check import inferred_shapes
from onnx_lowrank.graph.layers import layers, shapes_as_trace
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.layer import Array, Layer, LayerShape, Shape
from onnx_lowrank.micro_model import chain_model
from onnx_lowrank.passes.decompose.network import NetworkFormat
from onnx_lowrank.passes.decompose.two_stage import TwoStage
from onnx_lowrank.rewrite import Replacement, splice

every_method = pytest.mark.parametrize("method", EVERY.values(), ids=EVERY.keys())
CHANNELS = st.one_of(st.integers(1, 6), st.sampled_from([4, 6, 8, 12, 16]))
SMALL = st.integers(1, 3)
MODES = st.sampled_from([4, 6, 8, 8, 12, 12, 16, 16])  # what tensor networks can cut
RNG = np.random.default_rng(5)


@dataclass(frozen=True, eq=False)
class Case:
    """A model of one layer, the shape it is fed, and its initializer from the canonical weight."""

    proto: ModelProto
    x: Shape
    raw: Callable[[Array], Array]

    def layer(self, graph: Graph) -> Layer:
        """The layer, with the shapes it meets."""
        (found,), kept = layers(graph, shapes_as_trace(graph, inferred_shapes(graph, {"x": self.x})))
        assert not kept
        return found


@st.composite
def convolutions(draw: st.DrawFn, channels: st.SearchStrategy[int], kernels: st.SearchStrategy[int]) -> Case:
    n, groups = draw(st.sampled_from([2, 1, 3])), draw(st.sampled_from([1, 1, 1, 2]))
    kernel, strides, dilations = (draw(st.tuples(*[sizes] * n)) for sizes in (kernels, SMALL, SMALL))
    padding: dict[str, Any] = {"pads": draw(st.tuples(*[st.integers(0, 2)] * (2 * n))), "dilations": dilations}
    if draw(st.booleans()):
        padding = {"auto_pad": draw(st.sampled_from(["SAME_UPPER", "SAME_LOWER", "VALID"]))}
    in_, out = draw(channels.filter(lambda count: count > 1)), draw(channels)
    x = (draw(st.integers(1, 2)), groups * in_, *(draw(st.integers(7, 9)) for _ in range(n)))
    weight = (groups * out, in_, *kernel)
    declared = ("n", groups * in_, *"hwd"[:n]) if draw(st.booleans()) else x
    proto = conv_model(declared, weight, bias=draw(st.booleans()), strides=strides, group=groups, **padding)
    return Case(proto, x, lambda dense: dense.reshape(weight))


@st.composite
def products(draw: st.DrawFn, channels: st.SearchStrategy[int]) -> Case:
    in_, out, rows = draw(channels), draw(channels), draw(st.integers(1, 4))
    open_ = draw(st.booleans())
    m, n = ("m", "n") if open_ else (rows, 2)
    right, left = (lambda dense: dense[0].T), (lambda dense: dense[0])
    kinds = ["Gemm", "Gemm transposed", "MatMul", "vector", "left", "left of a stack", "left of a vector", "stack"]
    match draw(st.sampled_from(kinds)):
        case "Gemm":
            return Case(product_model("Gemm", (m, in_), (in_, out)), (rows, in_), right)
        case "Gemm transposed":
            return Case(product_model("Gemm", (m, in_), (out, in_), c=(out,), transB=1), (rows, in_), left)
        case "MatMul":
            return Case(product_model("MatMul", (n, m, in_), (in_, out)), (2, rows, in_), right)
        case "vector":
            return Case(product_model("MatMul", (in_,), (in_, out)), (in_,), right)
        case "left":
            return Case(product_model("MatMul", (in_, m), (out, in_), left=True), (in_, rows), left)
        case "left of a stack":
            return Case(product_model("MatMul", (n, in_, m), (out, in_), left=True), (2, in_, rows), left)
        case "left of a vector":
            return Case(product_model("MatMul", (in_,), (out, in_), left=True), (in_,), left)
        case _:
            proto = product_model("MatMul", (3, m, in_), (3, in_, out))
            return Case(proto, (3, rows, in_), lambda dense: dense.swapaxes(1, 2))


# What stands between the products of folded stages, and their bias.
MOVING = {"Add", "Concat", "Constant", "Gather", "Reshape", "Shape", "Slice", "Transpose"}


def draw_case(data: st.DataObject, method: Decomposition) -> Case:
    """A layer of a kind that the format takes; it may still be too small, or have groups."""
    channels = MODES if isinstance(method, NetworkFormat) else CHANNELS
    kinds: list[st.SearchStrategy[Case]] = []
    if method.refusal(LayerShape(1, 16, 16, (3, 3))) is None:
        kinds.append(convolutions(channels, st.sampled_from([3, 2, 1])))
    if method.refusal(LayerShape(1, 16, 16)) is None:
        kinds += [products(channels), convolutions(channels, st.just(1))]
    return data.draw(st.one_of(kinds))


def draw_rank(data: st.DataObject, method: Decomposition, shape: LayerShape) -> Rank:
    """Any rank the layer can have; where entries depend on each other, one that is priced."""
    limit = method.exact_rank(shape)
    if limit is None:
        priced = method.ranks(shape, 1)
        assume(priced)
        return data.draw(st.sampled_from(priced))
    every = st.tuples(*(st.integers(1, most) for most in limit))
    drawn = data.draw(st.one_of(st.sampled_from([*method.ranks(shape, 1), limit]), every))
    assert method.misfit(shape, drawn) is None
    return drawn


def counted(proto: ModelProto, x: Shape) -> tuple[int, int]:
    """Weights and multiply-accumulates of all products of a graph, from initializers and inferred shapes alone."""
    shapes = inferred_shapes(Graph(proto), {"x": x})
    weights = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    params = macs = 0
    for node in proto.graph.node:
        if node.op_type not in {"Conv", "Gemm", "MatMul"}:
            assert node.op_type in MOVING
            continue
        a, b = node.input[:2]
        y = [int(d or 0) for d in shapes[node.output[0]]]
        weight = weights[a] if a in weights else weights[b]
        params += math.prod(weight)
        if node.op_type == "Conv":
            macs += math.prod(y) * math.prod(weight[1:])
        else:
            flags = {attribute.name: attribute.i for attribute in node.attribute}
            first = weights[a] if a in weights else [int(d or 0) for d in shapes[a]]
            macs += math.prod(y) * first[-2 if flags.get("transA") else -1]
    return params, macs


@every_method
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_one_layer(method: Decomposition, data: st.DataObject) -> None:
    """Shapes, errors, counts and the graph of one layer at one rank."""
    case = draw_case(data, method)
    graph = Graph(case.proto)
    layer = case.layer(graph)
    refusal = method.refusal(layer.shape)
    if refusal is not None:
        assert len(refusal.split()) > 4
        assert str(layer.shape) in refusal
        return
    rank = draw_rank(data, method, layer.shape)
    weight = layer.read().astype(np.float64)
    made, chain = method.factorize(weight), method.chain(layer.shape, rank)
    factors = made.factors(rank)

    assert [factor.shape for factor in factors] == [stage.weight for stage in chain.stages]
    assert sum(factor.size for factor in factors) == chain.params
    dense = chain.dense(factors)
    assert dense.shape == weight.shape == layer.shape.weight
    error = np.linalg.norm(weight - dense) / np.linalg.norm(weight)
    assert error <= made.error(rank) + 1e-7
    if isinstance(method, TwoStage):
        assert error == pytest.approx(made.error(rank), abs=1e-7)
    if rank == method.exact_rank(layer.shape):
        assert error < 1e-5
        assert made.error(rank) < 1e-5

    splice(graph, [Replacement(layer, chain, Fit(tuple(factors)), {})])
    written = graph.to_proto()
    assert counted(written, case.x) == (chain.params, chain.macs(layer))
    feeds = {"x": RNG.standard_normal(case.x).astype(np.float32)}
    put_back = original_with(case, dense)
    assert relative_error(outputs(put_back, feeds)[0], outputs(written, feeds)[0]) < 1e-5


def original_with(case: Case, dense: Array) -> ModelProto:
    """The user's node with another weight."""
    copy = ModelProto()
    copy.CopyFrom(case.proto)
    tensor = next(t for t in copy.graph.initializer if t.name == "w")
    array = np.ascontiguousarray(case.raw(dense), dtype=np.float32)
    assert array.shape == tuple(tensor.dims)
    tensor.CopyFrom(numpy_helper.from_array(array, "w"))
    return copy


@every_method
@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_what_is_timed_is_the_chain(method: Decomposition, data: st.DataObject) -> None:
    """The one-chain model on onnxruntime equals the one-node model with the product of its random factors."""
    case = draw_case(data, method)
    layer = case.layer(Graph(case.proto))
    if method.refusal(layer.shape) is not None:
        return
    chain = method.chain(layer.shape, draw_rank(data, method, layer.shape))
    site = layer.sites[0]
    timed, dense = chain_model(layer, chain, site), chain_model(layer, None, site)
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in timed.graph.initializer}
    factors = [canonical(layer, stage, held[f"w{i}"]) for i, stage in enumerate(chain.stages)]
    product = chain.dense(factors)
    for tensor in dense.graph.initializer:
        if tensor.name == "w0":
            array = np.ascontiguousarray(laid_out(layer, product), dtype=np.float32)
            tensor.CopyFrom(numpy_helper.from_array(array, "w0"))
        else:
            tensor.CopyFrom(numpy_helper.from_array(held[tensor.name], tensor.name))
    feeds = {"x": RNG.standard_normal(site.input_shape).astype(np.float32)}
    assert relative_error(outputs(dense, feeds)[0], outputs(timed, feeds)[0]) < 1e-5


def canonical(layer: Layer, stage: Stage, array: Array) -> Array:
    op, side = layer.form.op, layer.form.side
    turned = op != "Conv" if isinstance(stage, Folded) else (op, side) == ("MatMul", "right")
    return (array.swapaxes(-1, -2) if turned else array).reshape(stage.weight)


def laid_out(layer: Layer, dense: Array) -> Array:
    if layer.form.op == "Conv":
        return dense.reshape(-1, *dense.shape[2:])
    matrices = dense.reshape(*layer.form.batch, *dense.shape[1:])
    return matrices.swapaxes(-1, -2) if layer.form.op == "MatMul" and layer.form.side == "right" else matrices


def test_padded_macs_round_the_channels_between_stages_up() -> None:
    proto = conv_model((1, 16, 10, 10), (24, 16, 3, 3), pads=[1] * 4)
    layer = Case(proto, (1, 16, 10, 10), lambda dense: dense).layer(Graph(proto))
    chain = EVERY["svd"].chain(layer.shape, (5,))
    assert chain.macs(layer) == 100 * (5 * 16 * 9 + 24 * 5)
    assert chain.macs(layer, block=8) == 100 * (8 * 16 * 9 + 24 * 8)
