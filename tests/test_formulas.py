"""Weights and multiply-accumulates of every format, at every priced rank, against what the literature says of them.

A stage is (weights, copies, axes): its weights are applied `copies` times at every position, and the spatial `axes`
have their output size from it on.
"""

from __future__ import annotations

import math

import pytest
from builders import conv_model, product_model
from formats import EVERY

from onnx_lowrank.decomposition import Decomposition, Rank
from onnx_lowrank.graph.check import inferred_shapes
from onnx_lowrank.graph.layers import layers, shapes_as_trace
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.layer import Layer, LayerShape, Shape
from onnx_lowrank.passes.decompose.modes import cut

Counted = tuple[int, int, tuple[int, ...]]
CONVOLUTION = LayerShape(1, 24, 16, (3, 2))
SHAPES = [
    CONVOLUTION,
    LayerShape(1, 8, 16, (1, 3)),
    LayerShape(2, 12, 8, (3, 3)),
    LayerShape(1, 64, 48, (1, 1)),
    LayerShape(1, 128, 64),
    LayerShape(1, 256, 256),
]


def stages(name: str, shape: LayerShape, rank: Rank) -> list[Counted]:  # noqa: C901 - one case per format
    """Of one group."""
    s, c, k, every = shape.out, shape.in_, math.prod(shape.kernel), tuple(range(len(shape.kernel)))
    kh, *rest = shape.kernel or (1,)
    kw = math.prod(rest)
    match name, rank:
        case "svd", (r,):
            return [(r * c * k, 1, every), (s * r, 1, ())]
        case "svd_input", (r,):
            return [(r * c, 1, ()), (s * r * k, 1, every)]
        case "spatial_svd", (r,):
            return [(r * c * kh, 1, (0,)), (s * r * kw, 1, (1,))]
        case "spatial_svd_reversed", (r,):
            return [(r * c * kw, 1, (1,)), (s * r * kh, 1, (0,))]
        case "grouped_svd", (n, j):
            return [(j * c * k, 1, every), (s * n * j, 1, ())]
        case "tucker2", (r1, r2):
            return [(r1 * c, 1, ()), (r1 * r2 * k, 1, every), (s * r2, 1, ())]
        case "cp", (r,):
            return [(r * c, 1, ()), (r * k, 1, every), (r * s, 1, ())]
        case "cp_spatial", (r,):
            return [(r * c, 1, ()), (r * kh, 1, (0,)), (r * kw, 1, (1,)), (r * s, 1, ())]
        case "block_term", (n, r1, r2):
            return [(n * r1 * c, 1, ()), (n * r1 * r2 * k, 1, every), (n * s * r2, 1, ())]
        case "tensor_train", (r1, r2, r3):
            return [(c * r1, 1, ()), (r1 * kh * r2, 1, (0,)), (r2 * kw * r3, 1, (1,)), (r3 * s, 1, ())]
        case "tensor_ring", (r1, r2, r3):
            return [(r2 * r3 * c, 1, ()), (r3 * r1 * k, r2, every), (r1 * r2 * s, 1, ())]
        case "kronecker", (s1, c1, *mine, r):
            theirs = k // math.prod(mine)
            first = tuple(axis for axis, part in enumerate(mine) if part == 1)
            last = tuple(axis for axis, part in enumerate(mine) if part > 1)
            b, a = r * (s // s1) * (c // c1) * theirs, r * s1 * c1 * math.prod(mine)
            return [(b, c1, first), (a, s // s1, last)]
        case "semi_tensor", (t, r1, r2):
            return [(c * r1 // t**2, t, ()), (r1 * r2 * k, 1, every), (s * r2 // t**2, t, ())]
        case "semi_tensor_train", (t, r1, r, r2):
            long = next((axis for axis in every if shape.kernel[axis] > 1), 0)
            first, others = math.prod(shape.kernel[long : long + 1]), tuple(axis for axis in every if axis != long)
            core = [(r1 * first * r, 1, every[long : long + 1]), (r * (k // first) * r2, 1, others)]
            return [(c * r1 // t**2, t, ()), *core, (s * r2 // t**2, t, ())]
        case "semi_tensor_ring", (t, r1, r2, r3):
            return [(r2 * c * r3 // t**2, t, ()), (r3 * r1 * k, r2, every), (r2 * s * r1 // t**2, t, ())]
        case "tt_matrix" | "hierarchical_tucker", (count, r):
            outs, ins = cut(s, count), cut(c, count)
            assert outs is not None
            assert ins is not None
            made = train if name == "tt_matrix" else tree
            (weights, copies), *others = made(outs, ins[::-1], r)
            return [(weights, copies, every), *((weights, copies, ()) for weights, copies in others)]
        case _:
            raise AssertionError(name)


def train(o: Shape, i: Shape, r: int) -> list[tuple[int, int]]:
    """Weights r_(k-1) O_k I_k r_k and copies of each core, the last one first."""
    count, pairs = len(o), [a * b for a, b in zip(o, i, strict=True)]
    bonds = [min(r, math.prod(pairs[:k]), math.prod(pairs[k:])) for k in range(count + 1)]
    return [
        (bonds[k] * pairs[k] * bonds[k + 1], math.prod(i[:k]) * math.prod(o[k + 1 :])) for k in reversed(range(count))
    ]


def tree(o: Shape, i: Shape, r: int) -> list[tuple[int, int]]:
    """Weights and copies of leaves O_k I_k r_k and transfer tensors r_left r_right r, from the first leaf on.

    A leaf is shared over the inputs to come, the outputs there are, and a bond that waits for another leaf.
    """
    pairs = [a * b for a, b in zip(o, i, strict=True)]
    whole = math.prod(pairs)
    leaf = [min(r, pair, whole // pair) for pair in pairs]
    if len(o) == 3:
        pair = min(r, pairs[1] * pairs[2], pairs[0])
        return [
            (pairs[0] * leaf[0], i[1] * i[2]),
            (leaf[0] * pair, o[0] * i[1] * i[2]),
            (pair * leaf[1] * leaf[2], o[0] * i[1] * i[2]),
            (pairs[1] * leaf[1], o[0] * i[2] * leaf[2]),
            (pairs[2] * leaf[2], o[0] * o[1]),
        ]
    left = right = min(r, pairs[0] * pairs[1], pairs[2] * pairs[3])
    return [
        (pairs[0] * leaf[0], i[1] * i[2] * i[3]),
        (leaf[0] * leaf[1] * left, o[0] * i[1] * i[2] * i[3]),
        (pairs[1] * leaf[1], o[0] * i[2] * i[3] * left),
        (left * right, o[0] * o[1] * i[2] * i[3]),
        (right * leaf[2] * leaf[3], o[0] * o[1] * i[2] * i[3]),
        (pairs[2] * leaf[2], o[0] * o[1] * i[3] * leaf[3]),
        (pairs[3] * leaf[3], o[0] * o[1] * o[2]),
    ]


def layer_of(shape: LayerShape) -> Layer:
    """Two samples; the first axis has stride 2 and pads that its stride does not divide."""
    if shape.kernel:
        x, weight = (2, shape.groups * shape.in_, 9, 8), (shape.groups * shape.out, shape.in_, *shape.kernel)
        proto = conv_model(x, weight, strides=[2, 1], pads=[1, 0, 2, 1], group=shape.groups)
    else:
        x = (2, 5, shape.in_)
        proto = product_model("MatMul", x, (shape.in_, shape.out))
    graph = Graph(proto)
    (layer,), _ = layers(graph, shapes_as_trace(graph, inferred_shapes(graph, {"x": x})))
    assert layer.shape == shape
    return layer


@pytest.mark.parametrize("method", EVERY.values(), ids=EVERY.keys())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_and_work_are_those_of_the_literature(method: Decomposition, shape: LayerShape) -> None:
    if method.refusal(shape) is not None:
        return
    layer, ranks = layer_of(shape), method.ranks(shape, 1)
    (site,) = layer.sites
    assert ranks
    for rank in ranks:
        chain, counted = method.chain(shape, rank), stages(method.name, shape, rank)
        assert chain.params == shape.groups * sum(weights for weights, _, _ in counted)
        if not shape.kernel:
            assert chain.macs(layer) == 10 * sum(weights * copies for weights, copies, _ in counted)
            continue
        size, work = list(site.input_shape[2:]), 0
        for weights, copies, axes in counted:
            for axis in axes:
                size[axis] = site.output_shape[2 + axis]
            work += weights * copies * math.prod(size)
        assert chain.macs(layer) == 2 * shape.groups * work


def test_no_format_refuses_all_of_these_layers() -> None:
    for method in EVERY.values():
        assert any(method.refusal(shape) is None for shape in SHAPES)
