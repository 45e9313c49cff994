"""A weight-bearing layer in canonical form: weight of shape (groups, out, in, *kernel), whatever node carries it.

y[g, s, p] = sum_{c, k} W[g, s, c, k] x[g, c, p * stride + k * dilation - pad]. Gemm and MatMul have an empty kernel; a
MatMul with a stack of constant matrices has one group per matrix. Transposes, alpha and casts of the node are absorbed
when the weight is read, so that no decomposition ever sees them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class LayerShape:
    """Sizes of a canonical weight: `groups` blocks of (out, in, *kernel)."""

    groups: int
    out: int
    in_: int
    kernel: Shape = ()

    @property
    def weight(self) -> Shape:
        """Shape of the canonical weight array."""
        return (self.groups, self.out, self.in_, *self.kernel)

    @property
    def params(self) -> int:
        """Number of weights (no bias)."""
        return math.prod(self.weight)

    @property
    def inputs(self) -> int:
        """Unfolded inputs of one group: what one output is a weighted sum of."""
        return self.in_ * math.prod(self.kernel)

    @property
    def is_matrix(self) -> bool:
        """Whether the kernel covers one position only: Gemm, MatMul and 1x1 convolutions."""
        return math.prod(self.kernel) == 1

    def __str__(self) -> str:
        kernel = "x".join(map(str, self.kernel))
        groups = f"{self.groups}*" if self.groups > 1 else ""
        return f"{groups}{self.in_}->{self.out}" + (f" {kernel}" if kernel else "")


@dataclass(frozen=True)
class Geometry:
    """How a convolution walks over its input. `pads` as in ONNX: all begins, then all ends."""

    strides: Shape
    dilations: Shape
    pads: Shape
    auto_pad: str = "NOTSET"

    def restricted(self, axes: Shape) -> Geometry:
        """The geometry of a stage that carries only the spatial `axes`; on the others it does not move.

        Padding rules of ONNX look at each axis by itself, so SAME and VALID hold for a part of the axes as for all.
        """
        n = len(self.strides)
        keep = [axis in axes for axis in range(n)]
        return Geometry(
            strides=tuple(s if k else 1 for s, k in zip(self.strides, keep, strict=True)),
            dilations=tuple(d if k else 1 for d, k in zip(self.dilations, keep, strict=True)),
            pads=tuple(p if keep[i % n] else 0 for i, p in enumerate(self.pads)),
            auto_pad=self.auto_pad if any(keep) else "NOTSET",
        )

    def output_size(self, size: Shape, kernel: Shape) -> Shape:
        """Spatial output size of a convolution with `kernel` over an input of spatial `size`."""
        n = len(size)
        result: list[int] = []
        for i in range(n):
            reach = (kernel[i] - 1) * self.dilations[i] + 1
            if self.auto_pad in {"SAME_UPPER", "SAME_LOWER"}:
                result.append(-(-size[i] // self.strides[i]))
                continue
            pad = 0 if self.auto_pad == "VALID" else self.pads[i] + self.pads[i + n]
            result.append((size[i] + pad - reach) // self.strides[i] + 1)
        return tuple(result)


@dataclass(frozen=True)
class NodeShapes:
    """Shapes one node met on the target: one entry per operand that has a value, in order.

    `count` is the number of executions with these shapes per run of the model.
    """

    input_shapes: tuple[Shape, ...]
    output_shapes: tuple[Shape, ...]
    count: float = 1.0


Trace = Mapping[str, Sequence[NodeShapes]]


@dataclass(frozen=True)
class Site:
    """One place where a layer's weight is applied: the node's key, its shapes on the target, and how often it runs.

    `input_shape` is that of the activation. `count` is the number of executions per run of the model (bodies of Loop
    and Scan run often), weighted over the target's input shapes. `before_conv`: its output goes to a convolution (see
    `graph.behind`), in front of which latencies are then taken.
    """

    node: str
    input_shape: Shape
    output_shape: Shape
    count: float = 1.0
    before_conv: bool = False


@dataclass(frozen=True)
class Form:
    """What the node around the weight looks like: all that lowering a chain needs beside shapes and factors.

    Args:
        op: "Conv", "Gemm" or "MatMul".
        elem_type: ONNX element type of the weight (TensorProto.DataType); factors are written back in it.
        opset: The model's default-domain opset.
        geometry: Convolutions only.
        side: Which operand of Gemm or MatMul the weight is: "right" for y = x W^T, "left" for y = W x.
        transposed_input: Gemm applies its transpose flag to the activation.
        batch: Leading axes of a stack of constant matrices; their product is the number of groups.
        bias: Whether the node has a bias or C input.
        beta: Gemm's beta.
        activation: The operator after the layer that onnxruntime may fuse with it, with its attributes.
    """

    op: str
    elem_type: int
    opset: int
    geometry: Geometry | None = None
    side: str = "right"
    transposed_input: bool = False
    batch: Shape = ()
    bias: bool = False
    beta: float = 1.0
    activation: tuple[str, tuple[tuple[str, float], ...]] | None = None


@dataclass(frozen=True, eq=False)
class Layer:
    """A weight and every node that applies it. Nodes that share a weight share one Layer, so it stays shared.

    Args:
        key: Unique and stable in the model: scope path and name of the first node.
        shape: Canonical sizes.
        form: How the first node looks; the others may differ in bias, beta and activation.
        nodes: Keys of the nodes that apply this weight, in graph order.
        sites: One per node and shape it met on the target; empty where no trace was given.
        weight_name: The initializer or Constant the weight comes from.
        read: Reads the canonical weight as float64 or float32, (groups, out, in, *kernel); nothing is cached.
    """

    key: str
    shape: LayerShape
    form: Form
    nodes: tuple[str, ...]
    sites: tuple[Site, ...]
    weight_name: str
    read: Callable[[], Array] = field(repr=False)

    @property
    def macs(self) -> float:
        """Multiply-accumulates per run of the model."""
        return sum(site.count * self.shape.params / self.shape.groups * self._columns(site) for site in self.sites)

    def _columns(self, site: Site) -> int:
        """Output positions times batch, times groups: how often one group's block is applied."""
        return math.prod(site.output_shape) // self.shape.out


@dataclass(frozen=True)
class Kept:
    """A weight-bearing node that no decomposition will see, and the sentence that says why."""

    key: str
    node: str
    op: str
    reason: str
    shape: str = ""
    params: int = 0
    macs: float = 0.0
