"""A machine in a few numbers: the roofline model of latency (Williams, Waterman and Patterson, CACM 2009).

    t(stage) = launch + compute + transfer - overlap[kind] min(compute, transfer)
    compute  = 2 MACs (1 + n_half / n) / (efficiency[class] peak[type]),   n = in * prod(kernel)
    transfer = bytes(weight, input, output) / bandwidth

With overlap 1 this is max(compute, transfer), the roofline proper: what accelerators do, and matrix products on a CPU
too. With overlap 0 the two follow each other, as in CPU convolutions that rearrange their input first. n_half is
Hockney's half-performance length: products of vectors that long keep the units busy for half of the time. A chain takes
the sum of its stages.

A roofline gives estimates, never measurements; whatever is made from it says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.errors import InputError
from onnx_lowrank.latency.grid import KINDS, Kind
from onnx_lowrank.latency.work import BYTES, FLOAT32, OpClass, Step, Work

SCHEMA = 1
LARGEST_BLOCK = 4096
OP_CLASSES: tuple[OpClass, ...] = ("conv", "conv 1x1", "conv one axis", "conv grouped", "matmul")
Times = NDArray[np.float64]


@dataclass(frozen=True)
class Roofline:
    """A machine.

    Args:
        device: In words.
        origin: Where the numbers come from, in words: a data sheet, or how many latencies they were fitted to.
        peak_flops: Floating-point operations per second, by element type; other types run at the rate of float32.
        bandwidth: Bytes per second.
        launch_s: Seconds every operator takes whatever its size.
        efficiency: Share of the peak that the kernels of a class reach on large layers.
        overlap: Of each kind of operator: 1 where transfers hide behind arithmetic, 0 where one follows the other.
        half_length: n_half, in multiply-accumulates per output.
        blocks: Channel block of each kind of operator: ranks worth a look are its multiples.
    """

    device: str
    origin: str
    peak_flops: Mapping[str, float]
    bandwidth: float
    launch_s: float
    efficiency: Mapping[OpClass, float]
    overlap: Mapping[Kind, float]
    half_length: float
    blocks: Mapping[Kind, int] = field(default_factory=dict[Kind, int])

    @property
    def label(self) -> str:
        """The device in words that cannot be taken for a device something was measured on."""
        return f"{self.device} (estimated, not measured: {self.origin})"

    def ms(self, work: Work) -> float:
        """Estimated milliseconds of a chain."""
        return float(self.times(Features.of([work]))[0])

    def rate(self, op_class: OpClass, elem_type: str = FLOAT32) -> float:
        """Floating-point operations per second on large layers."""
        return self.efficiency[op_class] * self.peak_flops.get(elem_type, self.peak_flops[FLOAT32])

    def moved_ms(self, values: float, elem_type: str = FLOAT32) -> float:
        """Estimated milliseconds of an operator that only moves numbers."""
        return 1e3 * (self.launch_s + BYTES[elem_type] * values / self.bandwidth)

    def times(self, found: Features) -> Times:
        """Estimated milliseconds of each work."""
        rates = np.array([self.efficiency[name] for name in OP_CLASSES])[found.op_class]
        peaks = np.array([self.peak_flops.get(name, self.peak_flops[FLOAT32]) for name in BYTES])[found.elem_type]
        compute = found.flops * (1 + self.half_length / found.length) / (rates * peaks)
        transfer = found.bytes / self.bandwidth
        overlap = np.array([self.overlap[kind_of(name)] for name in OP_CLASSES])[found.op_class]
        steps = self.launch_s + compute + transfer - overlap * np.minimum(compute, transfer)
        return np.bincount(found.work, 1e3 * steps, minlength=found.count).astype(np.float64)

    def to_json(self) -> str:
        """For a file; `read_roofline` is the inverse."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n"


@dataclass(frozen=True, eq=False)
class Features:
    """Works as arrays, one entry per step.

    Args:
        work: Which work the step belongs to.
        op_class: Index in `OP_CLASSES`.
        elem_type: Index in `BYTES`.
        flops: Twice the multiply-accumulates.
        length: Multiply-accumulates per output.
        bytes: Weight, input and output.
        count: Number of works.
    """

    work: NDArray[np.intp]
    op_class: NDArray[np.intp]
    elem_type: NDArray[np.intp]
    flops: Times
    length: Times
    bytes: Times
    count: int

    @staticmethod
    def of(works: Sequence[Work]) -> Features:
        """Those of `works`."""
        steps = [(index, work.elem_type, step) for index, work in enumerate(works) for step in work.steps]
        names = list(BYTES)
        return Features(
            work=np.array([index for index, _, _ in steps], dtype=np.intp),
            op_class=np.array([OP_CLASSES.index(step.op_class) for _, _, step in steps], dtype=np.intp),
            elem_type=np.array([names.index(kind) for _, kind, _ in steps], dtype=np.intp),
            flops=np.array([2.0 * _macs(step) for _, _, step in steps]),
            length=np.array([float(step.in_ * math.prod(step.kernel)) for _, _, step in steps]),
            bytes=np.array([BYTES[kind] * step.values() for _, kind, step in steps]),
            count=len(works),
        )


def read_roofline(path: Path) -> Roofline:
    """Read a file that `latency fit` wrote.

    Raises:
        InputError: if it cannot be read, or a field is missing or not positive.
    """
    again = "fit it again with `onnx-lowrank latency fit`"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path} that is not JSON ({error})", "a roofline", again) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} ({error})", "a readable roofline", "check the path") from error
    if not isinstance(raw, dict) or "peak_flops" not in raw:
        raise InputError(f"{path}, which holds no roofline", "a roofline", again)
    if raw.get("schema") != SCHEMA:
        raise InputError(f"schema {raw.get('schema')!r} in {path}", f"schema {SCHEMA}", again)
    try:
        return roofline_of(raw)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        detail = f"{type(error).__name__}: {error}"
        raise InputError(f"{path} with a bad field ({detail})", "a roofline", again) from error


def roofline_of(raw: Mapping[str, Any]) -> Roofline:
    """A roofline from the fields of a file.

    Raises:
        KeyError, TypeError, ValueError: naming what is missing or wrong.
    """
    peaks = {str(name): _positive(f"peak_flops {name}", rate) for name, rate in raw["peak_flops"].items()}
    if FLOAT32 not in peaks:
        raise ValueError(f"peak_flops without {FLOAT32}")
    overlap: dict[Kind, float] = {kind: float(raw["overlap"][kind]) for kind in KINDS}
    if not all(0 <= share <= 1 for share in overlap.values()):
        raise ValueError(f"overlap {overlap!r}")
    blocks: dict[Kind, int] = {kind: _block(kind, raw["blocks"][kind]) for kind in KINDS}
    return Roofline(
        device=str(raw["device"]),
        origin=str(raw["origin"]),
        peak_flops=peaks,
        bandwidth=_positive("bandwidth", raw["bandwidth"]),
        launch_s=_positive("launch_s", raw["launch_s"]),
        efficiency={name: _positive(f"efficiency of {name}", raw["efficiency"][name]) for name in OP_CLASSES},
        overlap=overlap,
        half_length=_positive("half_length", raw["half_length"]),
        blocks=blocks,
    )


def kind_of(op_class: OpClass) -> Kind:
    """Matrix product or convolution."""
    return "matmul" if op_class == "matmul" else "conv"


def _positive(what: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{what} {value!r}")
    return float(value)


def _block(kind: Kind, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST_BLOCK:
        raise ValueError(f"block of {kind} {value!r}")
    return value


def _macs(step: Step) -> float:
    return float(step.groups * step.out * step.in_ * math.prod(step.kernel) * step.written)
