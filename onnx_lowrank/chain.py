"""A factored chain: stages, their shapes and the equation that gives the dense weight back. No arrays, hashable.

A chain of n stages replaces y = W x by y = W_n (... (W_1 x)). Every stage is a (grouped) convolution or matrix product
with a weight of shape (groups, out, in, *kernel); the einsum equation contracts these weights, first stage first, to
the canonical dense weight. Being linear in each factor, the equation is all that a least-squares refit needs.

Letters in parentheses share an axis, the first one slowest (as in einops): "(gr)" are the r blocks in each of g groups.

Where channels are products of modes (Kronecker products, tensor networks of matrices), a stage is `Folded`: it mixes
some modes and is shared over the others, which count as batch meanwhile.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from onnx_lowrank.contraction import contract
from onnx_lowrank.layer import Array, Layer, LayerShape, Shape, Site

_AXES = re.compile(r"\((\w+)\)|(\w)")


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

    @property
    def depthwise(self) -> bool:
        """Whether each channel stays by itself."""
        return self.out == self.in_ == 1

    @property
    def copies(self) -> int:
        """How often the weight is applied to each sample and position."""
        return 1


@dataclass(frozen=True)
class Folded(Stage):
    """A stage that is shared over some modes of the channels, of one group.

    The channels that arrive are cut into `modes`, major first, and put into `order`: the first `shared` of them are
    counted as batch, the others are the stage's inputs. What leaves, the shared modes and then `outs`, is put into the
    order `leaves` and counted as channels again.

    A class of its own, so that the words for other stages, and the keys of latencies made of them, stay what they are.

    Args:
        modes: Sizes; their product is the number of channels.
        order: A permutation of the modes; empty: as they come.
        shared: How many modes count as batch.
        outs: Modes of `out`.
        leaves: A permutation of the shared modes and `outs`; empty: as they are.
    """

    modes: Shape = ()
    order: Shape = ()
    shared: int = 0
    outs: Shape = ()
    leaves: Shape = ()

    @staticmethod
    def of(
        modes: Shape,
        outs: Shape,
        *,
        shared: int,
        order: Shape = (),
        leaves: Shape = (),
        kernel: Shape = (),
        carries: Shape = (),
    ) -> Folded:
        """The stage with these modes; numbers of channels follow."""
        arranged = [modes[i] for i in order] if order else list(modes)
        in_ = math.prod(arranged[shared:])
        return Folded(1, math.prod(outs), in_, kernel, carries, modes, order, shared, outs, leaves)

    @property
    def arranged(self) -> Shape:
        """The modes in order: shared ones, then inputs."""
        return tuple(self.modes[i] for i in self.order) if self.order else self.modes

    @property
    def left(self) -> Shape:
        """The modes that leave, before they are put into order: shared ones, then outputs."""
        return (*self.arranged[: self.shared], *self.outs)

    @property
    def weight(self) -> Shape:
        """Shape of the stage's weight array: (1, *outs, *inputs, *kernel), an axis for every mode."""
        return (1, *self.outs, *self.arranged[self.shared :], *self.kernel)

    @property
    def copies(self) -> int:
        """Product of the shared modes."""
        return math.prod(self.arranged[: self.shared])


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

    @property
    def letters(self) -> tuple[tuple[str, ...], str]:
        """Letters of every factor and of the dense weight, shared axes taken apart."""
        left, result = self.equation.translate(str.maketrans("", "", "()")).split("->")
        return tuple(left.split(",")), result

    @property
    def axes(self) -> list[str]:
        """Letters of each axis of the dense weight: groups, outputs, inputs, kernel."""
        return _axes(self.equation.split("->")[1])

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Length of every letter's axis.

        Raises:
            ValueError: if the stages do not say it.
        """
        subscripts = self.equation.split("->")[0].split(",")
        open_: list[tuple[str, int]] = []
        for text, stage in zip(subscripts, self.stages, strict=True):
            open_.extend(zip(_axes(text), stage.weight, strict=True))
        found: dict[str, int] = {}
        while open_:
            solved = [pair for pair in open_ if sum(letter not in found for letter in pair[0]) <= 1]
            if not solved:
                raise ValueError(f"got the equation {self.equation}; expected one whose shared axes follow from others")
            for axis, size in solved:
                rest = [letter for letter in axis if letter not in found]
                known = math.prod(found[letter] for letter in axis if letter in found)
                found.update(dict.fromkeys(rest, size // known))
            open_ = [pair for pair in open_ if pair not in solved]
        return found

    def apart(self, factors: Sequence[Array]) -> list[Array]:
        """The factors with one axis per letter."""
        return [
            factor.reshape([self.sizes[letter] for letter in letters])
            for factor, letters in zip(factors, self.letters[0], strict=True)
        ]

    def dense(self, factors: Sequence[Array]) -> Array:
        """The dense weight that `factors` stand for, (groups, out, in, *kernel)."""
        subscripts, result = self.letters
        found = contract(list(zip(subscripts, self.apart(factors), strict=True)), result, self.sizes)
        return found.reshape([math.prod(self.sizes[letter] for letter in axis) for axis in self.axes])

    def site_macs(self, layer: Layer, site: Site, block: int = 1) -> float:
        """Multiply-accumulates of one execution at `site`.

        With `block` > 1 channel counts between stages are rounded up to a multiple of it, as kernels with blocked
        layouts do: latency follows padded MACs much more closely than exact ones. Of a depthwise stage it is the
        number of blocks that is rounded.
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
            if stage.depthwise:
                channels = _round_up(stage.groups, block)
            else:
                out = stage.out if i == last else _round_up(stage.out, block)
                channels = stage.groups * out * (stage.in_ if i == 0 else _round_up(stage.in_, block))
            total += batch * math.prod(spatial) * channels * math.prod(stage.kernel) * stage.copies
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


def _axes(subscript: str) -> list[str]:
    """Letters of each axis of an array."""
    return [shared or single for shared, single in _AXES.findall(subscript)]


def _round_up(value: int, block: int) -> int:
    return -(-value // block) * block
