"""Basic Pitch note transcription: a constant-Q transform, stacked harmonically, and a few oddly shaped convolutions.

Bittner et al., A Lightweight Instrument-Agnostic Model for Polyphonic Note Transcription, ICASSP 2022.

Metric: F1 of active notes, frame by frame, on rendered chords; and the same against the original's.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from benchmarks.zoo.agreement import dice
from benchmarks.zoo.cache import Arrays
from benchmarks.zoo.model import LABEL, Outputs, Scores, ZooModel
from benchmarks.zoo.source import Wheel
from benchmarks.zoo.tones import hertz, note

INPUT = "serving_default_input_2:0"
RATE, SAMPLES, HOP, FRAMES = 22_050, 43_844, 256, 172
NOTES, LOWEST = 88, 21  # MIDI number of the first
THRESHOLD = 0.3


@dataclass(frozen=True)
class BasicPitch(ZooModel):
    """See the module."""

    @override
    def export(self, folders: Sequence[Path], target: Path) -> None:
        shutil.copyfile(folders[0] / "basic_pitch" / "saved_models" / "icassp_2022" / "nmp.onnx", target)

    @override
    def calibration(self, folders: Sequence[Path], original: Path, samples: int) -> Arrays:
        return {INPUT: _chords(samples, seed=11)[INPUT]}

    @override
    def evaluation(self, folders: Sequence[Path], original: Path) -> Arrays:
        return _chords(64, seed=12)

    @override
    def score(self, outputs: Outputs, reference: Outputs, data: Arrays, folder: Path) -> Scores:
        # Of two outputs as wide as the keyboard, the first is onsets, the second notes.
        found, original = (o[1] > THRESHOLD for o in (outputs, reference))
        return {"note_f1": dice(found, data[LABEL]), "agreement_f1": dice(found, original)}


def _chords(samples: int, seed: int) -> dict[str, NDArray[np.float32] | NDArray[np.bool_]]:
    """Two seconds of overlapping notes, and which note sounds in which frame."""
    rng = np.random.default_rng(seed)
    audio = np.zeros((samples, SAMPLES, 1), np.float32)
    active = np.zeros((samples, FRAMES, NOTES), bool)
    for wave, piano_roll in zip(audio, active, strict=True):
        for midi in rng.choice(np.arange(40, 85), size=int(rng.integers(3, 7)), replace=False):
            start = int(rng.integers(0, SAMPLES - RATE // 2))
            length = int(rng.integers(RATE // 4, SAMPLES - start))
            wave[start : start + length, 0] += note(rng, float(hertz(float(midi))), length, RATE)
            piano_roll[start // HOP : (start + length) // HOP, midi - LOWEST] = True
    audio += rng.normal(0, 0.01, audio.shape).astype(np.float32)
    return {INPUT: audio / np.abs(audio).max(1, keepdims=True), LABEL: active}


BASIC_PITCH = BasicPitch(
    name="basic_pitch",
    family="note transcription",
    sources=(Wheel("basic-pitch", "0.4.0", "738adb503aae7fdfc7d1e1511aa0ce35052315f260a19531ef4c356708425db0"),),
    inputs=(f"{INPUT}=1x43844x1",),
    batch=4,
)
