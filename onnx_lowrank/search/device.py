"""What planning needs of a device that is not here, be it known by latencies measured there or by estimates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from onnx_lowrank.latency.chains import Pricer
from onnx_lowrank.latency.grid import Kind
from onnx_lowrank.search.racer import Racer, Sample
from onnx_lowrank.target import InputShapes, Target


class Device(Protocol):
    """A device that is not here."""

    @property
    def label(self) -> str:
        """The device, and where what is known of it comes from, in words."""
        ...

    @property
    def source(self) -> str:
        """What knows its prices, for messages."""
        ...

    def block(self, kind: Kind) -> int:
        """The channel block there."""
        ...

    def pricer(self, level: str) -> Pricer:
        """What knows the prices of chains there."""
        ...

    def racer(self, target: Target, samples: Sequence[Sample], folder: Path, *, as_float32: bool) -> Racer:
        """What knows the latencies of whole models there."""
        ...

    def planning(self, shapes: tuple[InputShapes, ...]) -> Target:
        """What stands in for the device here, where the model is only looked at."""
        ...
