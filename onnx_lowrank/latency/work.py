"""What a machine has to do for a chain at a site: operations and tensors of every stage, in words that are read back.

Latency tables hold these words beside every latency, so that a model of the machine can be fitted to any of them:

    Conv 64->128 3x3 at 8x64x14x14 to 8x128x7x7: spatial_svd 1x32x64x3x1@7x14 1x128x32x1x3@7x7

is a layer, its input and output, and a chain of two stages, each with its weight and, for convolutions, the spatial
size of its output. "4*1x32x16" is a stage shared over modes: four times as many positions. Types other than float32 are
named behind the operator.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from onnx import TensorProto

from onnx_lowrank.chain import Chain, Stage
from onnx_lowrank.layer import Layer, Shape, Site

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
    rf" at (?P<input>{_SIZES}) to (?P<output>{_SIZES})(?:: \w+ (?P<stages>.+))?"
)
_STAGE = re.compile(rf"(?:(\d+)\*)?({_SIZES})(?:@({_SIZES}))?")
Weight = tuple[int, Shape]  # how often it is applied to each position, and its sizes: groups, out, in, kernel


@dataclass(frozen=True)
class Step:
    """One stage at a site.

    Args:
        groups: Independent blocks.
        out: Output channels per block.
        in_: Input channels per block.
        kernel: Kernel sizes; empty for a matrix product.
        read: Positions of its input (batch times spatial size, or rows; times the modes that it is shared over).
        written: Positions of its output.
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
    stages = (chain or Chain.unfactored(layer.shape)).stages
    sizes = _spatial(layer, stages, site)
    weights = [_weight(stage) for stage in stages]
    steps = _steps(weights, sizes, site.input_shape, site.output_shape)
    return Work(_layer_words(layer, site), elem_type_of(layer), steps)


def elem_type_of(layer: Layer) -> str:
    """Name of the layer's element type."""
    return _TYPES.get(layer.form.elem_type, FLOAT32)


def in_words(layer: Layer, chain: Chain | None, site: Site) -> str:
    """What is timed, for a reader and for `read_work`."""
    words = _layer_words(layer, site)
    if chain is None:
        return words
    sizes = _spatial(layer, chain.stages, site)
    stages = (
        (f"{stage.copies}*" if stage.copies > 1 else "") + _by(_weight(stage)[1]) + (f"@{_by(size)}" if size else "")
        for stage, size in zip(chain.stages, sizes, strict=True)
    )  # fmt: skip
    return f"{words}: {chain.method} {' '.join(stages)}"


def read_work(words: str) -> Work | None:
    """The inverse of `in_words`; None for words of an earlier version, or of something else."""
    match = _LAYER.fullmatch(words)
    if match is None:
        return None
    source, result = _numbers(match["input"]), _numbers(match["output"])
    groups, _, sides = match["shape"].rpartition("*")
    channels, _, kernel = sides.partition(" ")
    in_, out = (int(side) for side in channels.split("->"))
    weights: list[Weight] = [(1, (int(groups or 1), out, in_, *_numbers(kernel)))]
    sizes: list[Shape] = [result[2:] if kernel else ()]
    if match["stages"]:
        found = [_STAGE.fullmatch(stage) for stage in match["stages"].split()]
        if any(stage is None or len(_numbers(stage[2])) != len(weights[0][1]) for stage in found):
            return None
        weights = [(int(stage[1] or 1), _numbers(stage[2])) for stage in found if stage]
        sizes = [_numbers(stage[3] or "") for stage in found if stage]
    kind = match["type"] or FLOAT32
    counts = (source, result, *sizes, *((copies, *weight) for copies, weight in weights))
    if kind not in BYTES or not all(math.prod(each) for each in counts):
        return None
    return Work(words.partition(": ")[0], kind, _steps(weights, sizes, source, result))


def _layer_words(layer: Layer, site: Site) -> str:
    kind = elem_type_of(layer)
    named = layer.form.op if kind == FLOAT32 else f"{layer.form.op} {kind}"
    return f"{named} {layer.shape} at {_by(site.input_shape)} to {_by(site.output_shape)}"


def _spatial(layer: Layer, stages: Sequence[Stage], site: Site) -> list[Shape]:
    """Spatial output size of every stage; empty for matrix products."""
    geometry, sizes = layer.form.geometry, list[Shape]()
    size = site.input_shape[2:]
    for stage in stages:
        if geometry is not None:
            size = geometry.restricted(stage.carries).output_size(size, stage.kernel)
        sizes.append(size if geometry else ())
    return sizes


def _weight(stage: Stage) -> Weight:
    return stage.copies, (stage.groups, stage.out, stage.in_, *stage.kernel)


def _steps(weights: Sequence[Weight], sizes: Sequence[Shape], source: Shape, result: Shape) -> tuple[Step, ...]:
    copies, (groups, out, *kernel) = weights[-1]
    convolves = len(kernel) > 1
    rows = math.prod(result) // (copies * groups * out)
    read = source[0] * math.prod(source[2:]) if convolves else rows
    steps: list[Step] = []
    for (copies, (groups, out, in_, *kernel)), size in zip(weights, sizes, strict=True):
        written = source[0] * math.prod(size) if convolves else rows
        steps.append(Step(groups, out, in_, tuple(kernel), copies * read, copies * written))
        read = written
    return tuple(steps)


def _by(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def _numbers(text: str) -> Shape:
    return tuple(int(size) for size in text.split("x")) if text else ()
