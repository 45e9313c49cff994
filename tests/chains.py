"""Chains that reproduce a weight exactly, from random rotations: lowering is tested without any decomposition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto
from onnx.reference import ReferenceEvaluator

from onnx_lowrank.chain import Chain, Fit, Stage
from onnx_lowrank.graph.layers import layers
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.layer import Array, Layer, LayerShape
from onnx_lowrank.rewrite import Replacement, splice

KINDS = ("output", "input", "both", "spatial")
RNG = np.random.default_rng(1)


def exact(kind: str, weight: Array) -> tuple[Chain, list[Array]]:
    """A chain of the carry pattern `kind` whose product is `weight` (groups, out, in, *kernel), and its factors."""
    groups, out, in_, *kernel = weight.shape
    shape = LayerShape(groups, out, in_, tuple(kernel))
    n = len(kernel)
    k, ones, axes = "hwd"[:n], (1,) * n, tuple(range(n))
    first, last = "xyz"[:n], "uvt"[:n]
    q_out, q_in = (np.stack([_rotation(size) for _ in range(groups)]) for size in (out, in_))
    if kind == "spatial" and n > 1:
        return _spatial(weight, shape)
    outer = Stage(groups, out, out, ones)
    inner = Stage(groups, in_, in_, ones)
    full = Stage(groups, out, in_, shape.kernel, axes)
    expand = np.einsum("gqs->gsq", q_out).reshape(groups, out, out, *ones)
    reduce = q_in.reshape(groups, in_, in_, *ones)
    match kind:
        case "output":
            core = np.einsum(f"gqs,gsc{k}->gqc{k}", q_out, weight)
            return Chain(kind, (full, outer), f"gqc{k},gsq{last}->gsc{k}"), [core, expand]
        case "input":
            core = np.einsum(f"gsc{k},gpc->gsp{k}", weight, q_in)
            return Chain(kind, (inner, full), f"gpc{first},gsp{k}->gsc{k}"), [reduce, core]
        case _:
            core = np.einsum(f"gqs,gsc{k},gpc->gqp{k}", q_out, weight, q_in)
            equation = f"gpc{first},gqp{k},gsq{last}->gsc{k}"
            return Chain(kind, (inner, full, outer), equation), [reduce, core, expand]


def moment(shape: LayerShape, condition: float, seed: int = 0) -> Array:
    """Random eigenvectors, eigenvalues falling geometrically from 1 to 1 / `condition`."""
    n = shape.inputs
    q = np.linalg.qr(np.random.default_rng(seed).standard_normal((shape.groups, n, n)))[0]
    return (q * np.geomspace(1, 1 / condition, n)) @ q.swapaxes(1, 2)


def replacement(layer: Layer, kind: str, stamp: Mapping[str, str]) -> Replacement:
    """The layer in place of an exact chain of itself."""
    chain, factors = exact(kind, layer.read())
    return Replacement(layer, chain, Fit(tuple(factors)), stamp)


def rewritten(model: ModelProto, kind: str = "output") -> tuple[ModelProto, int]:
    """The model with every layer in place of an exact chain, and how many layers there were."""
    graph = Graph(model)
    found, _ = layers(graph)
    splice(graph, [replacement(layer, kind, {"method": kind}) for layer in found])
    return graph.to_proto(), len(found)


def outputs(model: ModelProto, feeds: Mapping[str, NDArray[np.generic]]) -> Sequence[NDArray[np.generic]]:
    """Outputs on onnxruntime."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [np.asarray(array) for array in session.run(None, dict(feeds))]


def reference(model: ModelProto, feeds: Mapping[str, NDArray[np.generic]]) -> NDArray[np.generic]:
    """First output on onnx's own evaluator, for what onnxruntime has no kernel for."""
    return np.asarray(next(iter(ReferenceEvaluator(model).run(None, dict(feeds)))))


def relative_error(expected: NDArray[np.generic], got: NDArray[np.generic]) -> float:
    """Relative L2 distance of arrays that must have one shape."""
    assert expected.shape == got.shape
    assert expected.dtype == got.dtype
    difference = np.linalg.norm(expected.astype(np.float64) - got.astype(np.float64))
    return float(difference / max(np.linalg.norm(expected.astype(np.float64)), 1e-30))


def _rotation(size: int) -> Array:
    return np.linalg.qr(RNG.standard_normal((size, size)))[0]


def _spatial(weight: Array, shape: LayerShape) -> tuple[Chain, list[Array]]:
    """The first axis in the first stage, the others in the last; SVD of the unfolding (s, k_rest) x (c, k_first)."""
    groups, out, in_, height, *rest = weight.shape
    n = 1 + len(rest)
    order = (0, 1, *range(4, 3 + n), 2, 3)
    u, sigma, v = np.linalg.svd(weight.transpose(order).reshape(groups, -1, in_ * height), full_matrices=False)
    rank = sigma.shape[1]
    a = (u * sigma[:, None, :]).reshape(groups, out, -1, rank).swapaxes(2, 3).reshape(groups, out, rank, 1, *rest)
    b = v.reshape(groups, rank, in_, height, *(1,) * len(rest))
    first = Stage(groups, rank, in_, (height, *(1,) * len(rest)), (0,))
    last = Stage(groups, out, rank, (1, *rest), tuple(range(1, n)))
    one, other = "h" + "xy"[: n - 1], "u" + "wd"[: n - 1]
    return Chain("spatial", (first, last), f"grc{one},gsr{other}->gsch{other[1:]}"), [b, a]
