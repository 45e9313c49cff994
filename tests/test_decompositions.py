"""The contract of every decomposition in the folder: a new file gets these tests without asking for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from builders import conv_model, product_model
from chains import outputs, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, numpy_helper

from onnx_lowrank.decomposition import Decomposition, Rank, aligned
from onnx_lowrank.graph.check import inferred_shapes
from onnx_lowrank.graph.layers import layers, shapes_as_trace
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.layer import Array, Layer, LayerShape, Shape
from onnx_lowrank.passes.decompose import decompositions
from onnx_lowrank.passes.decompose.tucker2 import Tucker2
from onnx_lowrank.passes.decompose.two_stage import TwoStage
from onnx_lowrank.rewrite import Replacement, chain_model, splice

METHODS = decompositions()
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
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
def convolutions(draw: st.DrawFn, groups: int | None = None) -> Case:
    n = draw(st.integers(1, 3))
    groups = groups or draw(st.sampled_from([1, 1, 2]))
    kernel, strides, dilations = (draw(st.tuples(*[st.integers(1, 3)] * n)) for _ in range(3))
    padding: dict[str, Any] = {"pads": draw(st.tuples(*[st.integers(0, 2)] * (2 * n))), "dilations": dilations}
    if draw(st.booleans()):
        padding = {"auto_pad": draw(st.sampled_from(["SAME_UPPER", "SAME_LOWER", "VALID"]))}
    in_, out = draw(st.integers(2, 5)), draw(st.integers(1, 6))
    x = (draw(st.integers(1, 2)), groups * in_, *(draw(st.integers(7, 9)) for _ in range(n)))
    weight = (groups * out, in_, *kernel)
    proto = conv_model(x, weight, bias=draw(st.booleans()), strides=strides, group=groups, **padding)
    return Case(proto, x, lambda dense: dense.reshape(weight))


@st.composite
def products(draw: st.DrawFn) -> Case:
    in_, out, rows = draw(st.integers(1, 7)), draw(st.integers(1, 7)), draw(st.integers(1, 4))
    op = draw(st.sampled_from(["Gemm", "Gemm transposed", "MatMul", "MatMul left", "MatMul stack"]))
    match op:
        case "Gemm":
            return Case(product_model("Gemm", (rows, in_), (in_, out)), (rows, in_), lambda dense: dense[0].T)
        case "Gemm transposed":
            proto = product_model("Gemm", (rows, in_), (out, in_), c=(out,), transB=1)
            return Case(proto, (rows, in_), lambda dense: dense[0])
        case "MatMul":
            return Case(product_model("MatMul", (2, rows, in_), (in_, out)), (2, rows, in_), lambda dense: dense[0].T)
        case "MatMul left":
            proto = product_model("MatMul", (in_, rows), (out, in_), left=True)
            return Case(proto, (in_, rows), lambda dense: dense[0])
        case _:
            proto = product_model("MatMul", (3, rows, in_), (3, in_, out))
            return Case(proto, (3, rows, in_), lambda dense: dense.swapaxes(1, 2))


CASES = st.one_of(convolutions(), products())


def draw_rank(data: st.DataObject, method: Decomposition, shape: LayerShape) -> Rank:
    """Any rank the layer can have."""
    limit = method.exact_rank(shape)
    assert limit is not None
    return tuple(data.draw(st.integers(1, most)) for most in limit)


def all_ranks(limit: Rank) -> list[Rank]:
    return [tuple(int(i) + 1 for i in index) for index in np.ndindex(*limit)]


def bias_of(proto: ModelProto) -> int:
    return sum(math.prod(t.dims) for t in proto.graph.initializer if t.name != "w")


def counted(proto: ModelProto, x: Shape) -> tuple[int, int]:
    """Weights and multiply-accumulates of all nodes of a graph, from its initializers and inferred shapes alone."""
    shapes = inferred_shapes(Graph(proto), {"x": x})
    weights = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    params = macs = 0
    for node in proto.graph.node:
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
@given(case=CASES, data=st.data())
def test_one_layer(method: Decomposition, case: Case, data: st.DataObject) -> None:
    """Shapes, errors, counts and the graph of one layer at one rank."""
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

    splice(graph, [Replacement(layer, chain, factors, {})])
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
@given(case=CASES, data=st.data())
def test_what_is_timed_is_the_chain(method: Decomposition, case: Case, data: st.DataObject) -> None:
    """The one-chain model on onnxruntime equals the one-node model with the product of its random factors."""
    layer = case.layer(Graph(case.proto))
    if method.refusal(layer.shape) is not None:
        return
    chain = method.chain(layer.shape, draw_rank(data, method, layer.shape))
    site = layer.sites[0]
    timed, dense = chain_model(layer, chain, site), chain_model(layer, None, site)
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in timed.graph.initializer}
    factors = [canonical(layer, stage.weight, held[f"w{i}"]) for i, stage in enumerate(chain.stages)]
    product = chain.dense(factors)
    for tensor in dense.graph.initializer:
        if tensor.name == "w0":
            array = np.ascontiguousarray(laid_out(layer, product), dtype=np.float32)
            tensor.CopyFrom(numpy_helper.from_array(array, "w0"))
        else:
            tensor.CopyFrom(numpy_helper.from_array(held[tensor.name], tensor.name))
    feeds = {"x": RNG.standard_normal(site.input_shape).astype(np.float32)}
    assert relative_error(outputs(dense, feeds)[0], outputs(timed, feeds)[0]) < 1e-5


def canonical(layer: Layer, stage: Shape, array: Array) -> Array:
    turned = layer.form.op == "MatMul" and layer.form.side == "right"
    return (array.swapaxes(-1, -2) if turned else array).reshape(stage)


def laid_out(layer: Layer, dense: Array) -> Array:
    if layer.form.op == "Conv":
        return dense.reshape(-1, *dense.shape[2:])
    matrices = dense.reshape(*layer.form.batch, *dense.shape[1:])
    return matrices.swapaxes(-1, -2) if layer.form.op == "MatMul" and layer.form.side == "right" else matrices


SHAPES = [
    LayerShape(1, 5, 4, (3, 3)),
    LayerShape(2, 4, 3, (3, 2)),
    LayerShape(1, 6, 3, (1, 5)),
    LayerShape(1, 4, 5, (3,)),
    LayerShape(1, 3, 4, (2, 3, 2)),
    LayerShape(1, 6, 9),
    LayerShape(3, 4, 5),
    LayerShape(1, 7, 4, (1, 1)),
]


@every_method
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_errors_never_rise_with_the_rank(method: Decomposition, shape: LayerShape) -> None:
    limit = method.exact_rank(shape)
    if method.refusal(shape) is not None or limit is None:
        return
    made = method.factorize(RNG.standard_normal(shape.weight))
    for rank in all_ranks(limit):
        for axis in range(len(rank)):
            if rank[axis] > 1:
                less = (*rank[:axis], rank[axis] - 1, *rank[axis + 1 :])
                assert made.error(rank) <= made.error(less) + 1e-12
                assert made.spectral_error(rank) <= made.spectral_error(less) + 1e-12
    assert made.error(limit) == pytest.approx(0, abs=1e-7)
    assert made.spectral_error(limit) == pytest.approx(0, abs=1e-7)


def unfolded(method: Decomposition, weight: Array) -> Array:
    """The unfolding that a method's spectral error is relative to, (g, rows, columns)."""
    groups, out, _, *kernel = weight.shape
    first = method.first_axes(tuple(kernel)) if isinstance(method, TwoStage) else tuple(range(len(kernel)))
    last = tuple(axis for axis in range(len(kernel)) if axis not in first)
    order = (0, 1, *(3 + axis for axis in last), 2, *(3 + axis for axis in first))
    return weight.transpose(order).reshape(groups, out * math.prod(kernel[axis] for axis in last), -1)


@every_method
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_spectral_error_is_an_upper_bound(method: Decomposition, shape: LayerShape, seed: int) -> None:
    limit = method.exact_rank(shape)
    if method.refusal(shape) is not None or limit is None:
        return
    weight = np.random.default_rng(seed).standard_normal(shape.weight)
    if seed == 2:  # energy in one filter: the output unfolding feels what the input unfolding spreads
        weight[:, 1:] *= 0.01
    made = method.factorize(weight)
    largest = np.linalg.norm(unfolded(method, weight), 2, axis=(1, 2)).max()
    for rank in all_ranks(limit):
        cut = weight - method.chain(shape, rank).dense(made.factors(rank))
        spectral = np.linalg.norm(unfolded(method, cut), 2, axis=(1, 2)).max()
        assert spectral / largest <= made.spectral_error(rank) + 1e-7, rank


FORMULAS: dict[str, Callable[[int, int, Sequence[int], Rank], int]] = {
    "svd": lambda s, c, k, r: r[0] * c * math.prod(k) + s * r[0],
    "svd_input": lambda s, c, k, r: r[0] * c + s * r[0] * math.prod(k),
    "spatial_svd": lambda s, c, k, r: r[0] * c * k[0] + s * r[0] * math.prod(k[1:]),
    "spatial_svd_reversed": lambda s, c, k, r: r[0] * c * math.prod(k[1:]) + s * r[0] * k[0],
    "tucker2": lambda s, c, k, r: r[0] * c + r[0] * r[1] * math.prod(k) + s * r[1],
}


@every_method
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_of_the_chain_follow_the_published_formula(method: Decomposition, shape: LayerShape) -> None:
    limit = method.exact_rank(shape)
    if method.name not in FORMULAS or method.refusal(shape) is not None or limit is None:
        return
    for rank in all_ranks(limit):
        expected = shape.groups * FORMULAS[method.name](shape.out, shape.in_, shape.kernel, rank)
        assert method.chain(shape, rank).params == expected


@every_method
@pytest.mark.parametrize("block", [1, 4, 16])
@pytest.mark.parametrize("shape", [LayerShape(1, 48, 40, (3, 3)), LayerShape(2, 12, 20, (5, 1)), LayerShape(1, 64, 30)])
def test_ranks_are_aligned_and_save_weights(method: Decomposition, shape: LayerShape, block: int) -> None:
    if method.refusal(shape) is not None:
        return
    ranks = method.ranks(shape, block)
    assert ranks
    assert len(set(ranks)) == len(ranks)
    for rank in ranks:
        assert method.chain(shape, rank).params < shape.params
        assert all(part % block == 0 or block % part == 0 for part in rank)
        assert all(part <= most for part, most in zip(rank, method.exact_rank(shape) or rank, strict=True))


@every_method
def test_zero_weights_cost_nothing(method: Decomposition) -> None:
    shape = LayerShape(1, 4, 3, (3, 3))
    made = method.factorize(np.zeros(shape.weight))
    rank = tuple(1 for _ in method.exact_rank(shape) or ())
    assert (made.error(rank), made.spectral_error(rank)) == (0.0, 0.0)
    assert all(np.isfinite(factor).all() for factor in made.factors(rank))


@pytest.mark.parametrize(
    ("method", "shape", "sentence"),
    [
        ("svd", LayerShape(1, 1, 9), "9->1 is a vector: there is no rank to cut"),
        ("svd_input", LayerShape(1, 8, 9, (1, 1)), "9->8 1x1 has no kernel: svd gives the same chain"),
        ("svd_input", LayerShape(4, 1, 1, (3, 3)), "4*1->1 3x3 has one channel on a side: there is no rank to cut"),
        (
            "spatial_svd",
            LayerShape(1, 8, 9, (3,)),
            "9->8 3 has fewer than two spatial axes: there is nothing to separate",
        ),
        (
            "spatial_svd",
            LayerShape(1, 8, 9, (1, 3)),
            "9->8 1x3 is 1 wide along one spatial axis: svd gives the same chain",
        ),
        (
            "spatial_svd_reversed",
            LayerShape(1, 8, 9, (3, 1)),
            "9->8 3x1 is 1 wide along one spatial axis: svd gives the same chain",
        ),
        ("tucker2", LayerShape(1, 8, 9), "9->8 has no kernel: svd reaches the same error with one stage less"),
        (
            "tucker2",
            LayerShape(1, 8, 1, (3, 3)),
            "1->8 3x3 has one channel on a side: svd gives the same chain with one stage less",
        ),
    ],
)
def test_refusals(method: str, shape: LayerShape, sentence: str) -> None:
    assert METHODS[method].refusal(shape) == sentence


def test_hooi_improves_on_truncated_hosvd() -> None:
    shape = LayerShape(1, 12, 10, (3, 3))
    weight = RNG.standard_normal(shape.weight)
    errors: list[float] = []
    for sweeps in (0, 3):
        method = Tucker2(sweeps=sweeps)
        made = method.factorize(weight)
        product = method.chain(shape, (4, 5)).dense(made.factors((4, 5)))
        errors.append(float(np.linalg.norm(weight - product) / np.linalg.norm(weight)))
        assert errors[-1] <= made.error((4, 5)) + 1e-12
    assert errors[0] == pytest.approx(made.error((4, 5)), abs=1e-10)
    assert errors[1] < errors[0]


def test_padded_macs_round_the_channels_between_stages_up() -> None:
    proto = conv_model((1, 16, 10, 10), (24, 16, 3, 3), pads=[1] * 4)
    layer = Case(proto, (1, 16, 10, 10), lambda dense: dense).layer(Graph(proto))
    chain = METHODS["svd"].chain(layer.shape, (5,))
    assert chain.macs(layer) == 100 * (5 * 16 * 9 + 24 * 5)
    assert chain.macs(layer, block=8) == 100 * (8 * 16 * 9 + 24 * 8)


@pytest.mark.parametrize(
    ("limit", "block", "ranks"),
    [(40, 16, [1, 2, 4, 8, 16, 32]), (7, 16, [1, 2, 4]), (4, 1, [1, 2, 3, 4]), (0, 8, []), (8, 8, [1, 2, 4, 8])],
)
def test_aligned(limit: int, block: int, ranks: list[int]) -> None:
    assert aligned(limit, block) == ranks
