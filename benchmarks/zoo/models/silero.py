"""Silero voice activity detector: short-time Fourier transform by convolution, four convolutions, an LSTM cell by Gemm.

Metric: area under the ROC curve of a clip's mean probability, recorded prompts against rendered tones, both in noise.
A sample is a clip of 48 frames, fed one after the other with the state carried along.

Calibration arrays have one axis more than the graph's inputs: each sample is the whole feed of one call.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.io import wavfile
from scipy.signal import resample_poly
from typing_extensions import override

from benchmarks.zoo.cache import Arrays
from benchmarks.zoo.model import LABEL, Outputs, Scores, ZooModel
from benchmarks.zoo.session import Session
from benchmarks.zoo.source import Deb, Wheel
from benchmarks.zoo.tones import hertz, note

RATE, HOP, CONTEXT, FRAMES = 16_000, 512, 64, 48
SPEECH = Deb(
    "asterisk-core-sounds-en-wav", "1.6.1-1", "2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d"
)


@dataclass(frozen=True)
class Silero(ZooModel):
    """See the module."""

    @override
    def export(self, folders: Sequence[Path], target: Path) -> None:
        shutil.copyfile(folders[0] / "silero_vad" / "data" / "silero_vad_op18_ifless.onnx", target)

    @override
    def calibration(self, folders: Sequence[Path], original: Path, samples: int) -> Arrays:
        clips = _clips(folders[1], samples // 4, seed=13)["input"]
        session = Session(original)
        state = np.zeros((2, len(clips), 128), np.float32)
        feeds: list[dict[str, NDArray[Any]]] = []
        for frame in range(FRAMES):
            if frame % 6 == 5:
                frames = zip(clips[:, frame], state.transpose(1, 0, 2), strict=True)
                feeds += [{"input": x[None], "state": s[:, None], "sr": np.array(RATE)} for x, s in frames]
            _, state = session.run({"input": clips[:, frame], "state": state, "sr": np.array(RATE)})
        return {name: np.stack([feed[name] for feed in feeds]) for name in feeds[0]}

    @override
    def evaluation(self, folders: Sequence[Path], original: Path) -> Arrays:
        return _clips(folders[1], self.batch, seed=14)

    @override
    def run(self, session: Session, data: Arrays) -> list[NDArray[Any]]:
        clips = data["input"]
        state = np.zeros((2, len(clips), 128), np.float32)
        probabilities: list[NDArray[Any]] = []
        for frame in range(FRAMES):
            probability, state = session.run({"input": clips[:, frame], "state": state, "sr": np.array(RATE)})
            probabilities.append(probability)
        return [np.concatenate(probabilities, axis=1)]

    @override
    def score(self, outputs: Outputs, reference: Outputs, data: Arrays, folder: Path) -> Scores:
        means = outputs[0].mean(1)
        speech = data[LABEL] == 1
        beaten = (means[:, None] > means[~speech]).mean(1) + (means[:, None] == means[~speech]).mean(1) / 2
        return {"auc": (np.where(speech, beaten, 0.0), speech.astype(np.float64))}


def _clips(folder: Path, samples: int, seed: int) -> dict[str, NDArray[Any]]:
    """Speech (label 1) and tones (label 0) in turn, framed as the network wants them: 64 old samples, 512 new ones.

    Even seeds take speech from one half of the prompts, odd seeds from the other.
    """
    rng = np.random.default_rng(seed)
    files = sorted(path for path in folder.rglob("*.wav") if path.stat().st_size > 2 * 8000 * 1.5)[seed % 2 :: 2]
    length = FRAMES * HOP
    frames = np.arange(FRAMES)[:, None] * HOP + np.arange(CONTEXT + HOP)
    result = np.empty((samples, FRAMES, CONTEXT + HOP), np.float32)
    for index in range(samples):
        if index % 2:
            rate, recorded = wavfile.read(files[int(rng.integers(len(files)))])
            wave = np.resize(resample_poly(recorded / 32768, RATE, rate), length)
        else:
            wave = 0.3 * note(rng, float(hertz(rng.uniform(36, 84))), length, RATE)
        noisy = wave + rng.normal(0, wave.std() * 10 ** (-rng.uniform(0, 10) / 20), length)
        result[index] = np.pad(noisy, (CONTEXT, 0))[frames]
    return {"input": result, LABEL: np.arange(samples) % 2}


SILERO = Silero(
    name="silero",
    family="voice activity detector",
    sources=(
        Wheel("silero-vad", "6.2.3", "7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8"),
        SPEECH,
    ),
    inputs=("input=1x576", "state=2x1x128"),
    batch=200,
)
