"""What a machine has to do for a chain at a site: operations and tensors of every stage, in words that are read back.

Latency tables hold these words beside every latency, so that a model of the machine can be fitted to any of them:

    Conv 64->128 3x3 at 8x64x14x14 to 8x128x7x7: spatial_svd 1x32x64x3x1@7x14 1x128x32x1x3@7x7

is a layer, its input and output, and a chain of two stages, each with its weight and, for convolutions, the spatial
size of its output; `*4` behind a weight: it is applied to four parts of the channels. Types other than float32 are
named behind the operator. `before Conv` behind the output says that
the small convolution of `micro_model` follows, whose work counts too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from onnx import TensorProto

from onnx_lowrank.chain import Chain
from onnx_lowrank.layer import Layer, Shape, Site
from onnx_lowrank.micro_model import TAIL_CHANNELS

OpClass = Literal["conv", "conv 1x1", "conv one axis", "conv grouped", "matmul"]
FLOAT32 = "float32"
_TYPES: dict[int, str] = {
    TensorProto.FLOAT: FLOAT32,
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.DOUBLE: "float64",
}
BYTES = {FLOAT32: 4, "float16": 2, "bfloat16": 2, "float64": 8}
_SIZES = r"\d+(?:x\d+)*"
_LAYER = re.compile(
    rf"(?P<op>Conv|Gemm|MatMul)(?: (?P<type>\w*float\w+))? (?P<shape>(?:\d+\*)?\d+->\d+(?: {_SIZES})?)"
    rf" at (?P<input>{_SIZES}) to (?P<output>{_SIZES})(?P<tail> before Conv)?(?:: \w+ (?P<stages>.+))?"
)
_STAGE = re.compile(rf"(?P<weight>{_SIZES})(?:\*(?P<copies>\d+))?(?:@(?P<size>{_SIZES}))?")


@dataclass(frozen=True)
class Step:
    """One stage at a site.

    Args:
        groups: Independent blocks.
        out: Output channels per block.
        in_: Input channels per block.
        kernel: Kernel sizes; empty for a matrix product.
        read: Positions of its input (batch times spatial size, or rows), times the copies of the weight.
        written: Likewise of its output.
    """

    groups: int
    out: int
    in_: int
    kernel: Shape
    read: int
    written: int

    @property
    def op_class(self) -> OpClass:
        """Which of the kernels a runtime has for it."""
        if self.groups > 1:
            return "conv grouped" if self.kernel else "matmul"
        if not self.kernel:
            return "matmul"
        return ("conv 1x1", "conv one axis", "conv")[min(2, sum(size > 1 for size in self.kernel))]

    def values(self) -> float:
        """Numbers moved: weight, input and output once each."""
        weight = self.groups * self.out * self.in_ * math.prod(self.kernel)
        return weight + self.groups * (self.in_ * self.read + self.out * self.written)


@dataclass(frozen=True)
class Work:
    """All stages of a chain at a site.

    Args:
        layer: The layer and its site in words: chains with the same words compete with each other.
        elem_type: "float32", "float16", ....
        steps: In order of execution.
    """

    layer: str
    elem_type: str
    steps: tuple[Step, ...]


def work_of(layer: Layer, chain: Chain | None, site: Site) -> Work:
    """The work of a chain (None: the layer itself) at a site."""
    parts = _parts(layer, chain or Chain.unfactored(layer.shape), site)
    steps = _steps(parts, site.input_shape, site.output_shape, tail=site.before_conv)
    return Work(_layer_words(layer, site), elem_type_of(layer), steps)


def elem_type_of(layer: Layer) -> str:
    """Name of the layer's element type."""
    return _TYPES.get(layer.form.elem_type, FLOAT32)


def in_words(layer: Layer, chain: Chain | None, site: Site) -> str:
    """What is timed, for a reader and for `read_work`."""
    words = _layer_words(layer, site)
    if chain is None:
        return words
    return f"{words}: {chain.method} {' '.join(map(str, _parts(layer, chain, site)))}"


def read_work(words: str) -> Work | None:
    """The inverse of `in_words`; None for words of an earlier version, or of something else."""
    match = _LAYER.fullmatch(words)
    if match is None:
        return None
    source, result = _numbers(match["input"]), _numbers(match["output"])
    groups, _, sides = match["shape"].rpartition("*")
    channels, _, kernel = sides.partition(" ")
    in_, out = (int(side) for side in channels.split("->"))
    parts = [_Part((int(groups or 1), out, in_, *_numbers(kernel)), result[2:] if kernel else ())]
    if match["stages"]:
        found = [_part(stage) for stage in match["stages"].split()]
        if any(part is None or len(part.weight) != len(parts[0].weight) for part in found):
            return None
        parts = [part for part in found if part]
    kind = match["type"] or FLOAT32
    sizes = (size for part in parts for size in (*part.weight, *part.size, part.copies))
    if kind not in BYTES or not all((*source, *result, *sizes)):
        return None
    return Work(words.partition(": ")[0], kind, _steps(parts, source, result, tail=bool(match["tail"])))


@dataclass(frozen=True)
class _Part:
    """A stage in words: its weight as (groups, out, in, *kernel), its spatial output size, and the weight's copies."""

    weight: Shape
    size: Shape
    copies: int = 1

    def __str__(self) -> str:
        copies = f"*{self.copies}" if self.copies > 1 else ""
        return _by(self.weight) + copies + (f"@{_by(self.size)}" if self.size else "")


def _part(words: str) -> _Part | None:
    match = _STAGE.fullmatch(words)
    return match and _Part(_numbers(match["weight"]), _numbers(match["size"] or ""), int(match["copies"] or 1))


def _layer_words(layer: Layer, site: Site) -> str:
    kind = elem_type_of(layer)
    named = layer.form.op if kind == FLOAT32 else f"{layer.form.op} {kind}"
    behind = " before Conv" if site.before_conv else ""
    return f"{named} {layer.shape} at {_by(site.input_shape)} to {_by(site.output_shape)}{behind}"


def _parts(layer: Layer, chain: Chain, site: Site) -> list[_Part]:
    """The stages; without a spatial size those of matrix products."""
    geometry, parts = layer.form.geometry, list[_Part]()
    size = site.input_shape[2:] if geometry else ()
    for stage in chain.stages:
        if geometry is not None:
            size = geometry.restricted(stage.carries).output_size(size, stage.kernel)
        parts.append(_Part((stage.groups, stage.out, stage.in_, *stage.kernel), size, stage.copies))
    return parts


def _steps(parts: Sequence[_Part], source: Shape, result: Shape, *, tail: bool) -> tuple[Step, ...]:
    convolves = len(parts[0].weight) > 3
    groups, out = parts[-1].weight[:2]
    rows = math.prod(result) // (groups * out * parts[-1].copies)
    read = source[0] * math.prod(source[2:]) if convolves else rows
    steps: list[Step] = []
    for part in parts:
        groups, out, in_, *kernel = part.weight
        written = source[0] * math.prod(part.size) if convolves else rows
        steps.append(Step(groups, out, in_, tuple(kernel), part.copies * read, part.copies * written))
        read = written
    if tail:
        steps.append(Step(1, TAIL_CHANNELS, result[1], (1, 1), result[0], result[0]))
    return tuple(steps)


def _by(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def _numbers(text: str) -> Shape:
    return tuple(int(size) for size in text.split("x")) if text else ()
