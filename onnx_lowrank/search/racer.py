"""Files run against each other in turns, on the target, on inputs of the target's shapes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from onnx_lowrank.errors import InputError, ProviderError
from onnx_lowrank.graph import io, twin
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.graph.size import LARGE_BYTES, file_bytes
from onnx_lowrank.latency.child import MeasuringError
from onnx_lowrank.latency.measure import Paired
from onnx_lowrank.latency.messages import Subject, Weighted
from onnx_lowrank.latency.race import race, race_repeatedly
from onnx_lowrank.signature import Feeds
from onnx_lowrank.target import Target

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Sample:
    """Inputs of one shape, and how much that shape counts in the latency."""

    feeds: Feeds
    weight: float = 1.0


@dataclass(frozen=True)
class Contestant:
    """A model file at one optimization level."""

    path: Path
    level: str


@dataclass
class Racer:
    """Times model files.

    Args:
        target: Where to run.
        samples: What to run on.
        folder: For float32 twins.
        as_float32: The provider has no kernels for the models' element types: their float32 twins run instead.
        seconds: Budget of one race.

    Attributes:
        cores: Processor cores that the last race was pinned to.
    """

    target: Target
    samples: Sequence[Sample]
    folder: Path
    as_float32: bool = False
    seconds: float = 15.0
    cores: tuple[int, ...] = field(default=(), init=False)
    _twins: dict[Path, Path] = field(default_factory=dict[Path, Path], init=False)

    def best_level(self, path: Path) -> Contestant:
        """The model at the optimization level it runs fastest at."""
        levels = [Contestant(path, level) for level in self.target.levels]
        if len(levels) == 1:
            return levels[0]
        timed = self.race(levels, self.seconds / 4)
        return min(zip((t.median_ms for t in timed.timings), range(len(levels)), levels, strict=True))[2]

    def gains(self, path: Path, variant: Path) -> bool:
        """Whether a variant of a model was measured faster than the model itself."""
        level = self.target.levels[0]
        gain = self.race([Contestant(path, level), Contestant(variant, level)]).ratio(0, 1)
        logger.info("%s: %s as fast", variant.stem, gain)
        return gain.low > 1.0

    def race(self, contestants: Sequence[Contestant], seconds: float | None = None) -> Paired:
        """Run the contestants in turns on every sample; milliseconds are weighted over the samples."""
        timed = race(self._entries(contestants), self.target, self._weighted(), seconds or self.seconds)
        self.cores = timed.cores
        return timed

    def repeated(self, contestants: Sequence[Contestant], seconds: float | None = None) -> Paired:
        """`race` in several processes, see `race_repeatedly`."""
        timed = race_repeatedly(self._entries(contestants), self.target, self._weighted(), seconds or self.seconds)
        self.cores = timed.cores
        return timed

    def trial(self, rivals: Sequence[Contestant], path: Path) -> tuple[Paired, str]:
        """A trial model in turns behind its rivals, which have run before, and the level it is fastest at.

        In several processes: what is decided by it has to hold in others.

        Raises:
            MeasuringError: if it does not run, whatever the provider says about it.
        """
        try:
            final = self.best_level(path)
            return self.repeated([*rivals, final]), final.level
        except MeasuringError:
            raise
        except (InputError, ProviderError) as error:
            raise MeasuringError(f"refused it ({error})", len(rivals)) from error

    def subject(self, contestant: Contestant) -> Subject | None:
        """A contestant to be timed beside chains; None where it is too large for that."""
        path = self.runnable(contestant.path)
        if file_bytes(path) > LARGE_BYTES:
            return None
        return Subject(path.absolute(), contestant.level, self.target, self._weighted())

    def _entries(self, contestants: Sequence[Contestant]) -> list[tuple[Path, str]]:
        return [(self.runnable(contestant.path), contestant.level) for contestant in contestants]

    def _weighted(self) -> list[Weighted]:
        return [(self.fed(sample), sample.weight) for sample in self.samples]

    def runnable(self, path: Path) -> Path:
        """The file itself, or its float32 twin where the element types have no kernels."""
        if not self.as_float32:
            return path
        if path not in self._twins:
            made = self.folder / f"float32_{len(self._twins)}.onnx"
            original = io.load(path)
            io.save(Graph(twin.fp32_twin(original.to_proto(), original.folder), original.folder), made)
            self._twins[path] = made
        return self._twins[path]

    def fed(self, sample: Sample) -> Feeds:
        """The sample in the types `runnable` takes."""
        if not self.as_float32:
            return sample.feeds
        floating = {name for name, array in sample.feeds.items() if array.dtype.kind not in "iubOUS"}
        return {n: array.astype(np.float32) if n in floating else array for n, array in sample.feeds.items()}
