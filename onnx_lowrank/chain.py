"""A factored chain: stages, their shapes and the equation that gives the dense weight back. No arrays, hashable.

A chain of n stages replaces y = W x by y = W_n (... (W_1 x)). Every stage is a (grouped) convolution or matrix product
with a weight of shape (groups, out, in, *kernel); the einsum equation contracts these weights, first stage first, to
the canonical dense weight. Being linear in each factor, the equation is all that a least-squares refit needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnx_lowrank.layer import Array, Layer, LayerShape, Shape, Site


@dataclass(frozen=True)
class Stage:
    """One linear map of a chain.

    Args:
        groups: Number of independent blocks.
        out: Output channels per block.
        in_: Input channels per block.
        kernel: Kernel sizes, one per spatial axis of the layer; 1 where the stage does not move.
        carries: Spatial axes whose stride, dilation and pads this stage carries.
    """

    groups: int
    out: int
    in_: int
    kernel: Shape = ()
    carries: Shape = ()

    @property
    def weight(self) -> Shape:
        """Shape of the stage's weight array."""
        return (self.groups, self.out, self.in_, *self.kernel)

    @property
    def params(self) -> int:
        """Number of weights."""
        return math.prod(self.weight)


@dataclass(frozen=True)
class Chain:
    """Stages in order of execution and the equation of their product.

    Args:
        method: Name of the decomposition.
        stages: At least one.
        equation: einsum over the stage weights, in order, giving (groups, out, in, *kernel).
    """

    method: str
    stages: tuple[Stage, ...]
    equation: str

    @staticmethod
    def unfactored(shape: LayerShape) -> Chain:
        """The layer itself as a chain of one stage: what every other chain is compared with."""
        axes = tuple(range(len(shape.kernel)))
        letters = "gsc" + "hwd"[: len(axes)]
        stage = Stage(shape.groups, shape.out, shape.in_, shape.kernel, axes)
        return Chain("dense", (stage,), f"{letters}->{letters}")

    @property
    def params(self) -> int:
        """Number of weights of all stages."""
        return sum(stage.params for stage in self.stages)

    def dense(self, factors: Sequence[Array]) -> Array:
        """The dense weight that `factors` stand for, (groups, out, in, *kernel)."""
        return np.einsum(self.equation, *factors, optimize=True)

    def site_macs(self, layer: Layer, site: Site, block: int = 1) -> float:
        """Multiply-accumulates of one execution at `site`.

        With `block` > 1 channel counts between stages are rounded up to a multiple of it, as kernels with blocked
        layouts do: latency follows padded MACs much more closely than exact ones.
        """
        geometry = layer.form.geometry
        spatial = site.input_shape[2:] if geometry else ()
        outer = math.prod(site.output_shape) // (layer.shape.groups * layer.shape.out)
        batch = site.output_shape[0] if geometry else outer
        total = 0.0
        last = len(self.stages) - 1
        for i, stage in enumerate(self.stages):
            if geometry:
                spatial = geometry.restricted(stage.carries).output_size(spatial, stage.kernel)
            out = stage.out if i == last else _round_up(stage.out, block)
            in_ = stage.in_ if i == 0 else _round_up(stage.in_, block)
            total += batch * math.prod(spatial) * stage.groups * out * in_ * math.prod(stage.kernel)
        return total

    def macs(self, layer: Layer, block: int = 1) -> float:
        """Multiply-accumulates per run of the model, over all sites of `layer`."""
        return sum(site.count * self.site_macs(layer, site, block) for site in layer.sites)


@dataclass(frozen=True, eq=False)
class Fit:
    """The arrays of a chain.

    Args:
        factors: Weights of the stages, first stage first, each of shape `stage.weight`.
        bias: What is added to the layer's bias, (groups * out,); None for nothing.
    """

    factors: tuple[Array, ...]
    bias: Array | None = None


def _round_up(value: int, block: int) -> int:
    return -(-value // block) * block
