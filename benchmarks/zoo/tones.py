"""Rendered notes with exact pitch."""

import numpy as np
from numpy.typing import NDArray


def hertz(midi: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """Frequency of a MIDI note number, 69 = 440 Hz."""
    return 440.0 * 2.0 ** ((np.asarray(midi) - 69) / 12)


def note(rng: np.random.Generator, frequency: float, length: int, rate: int) -> NDArray[np.float64]:
    """A harmonic tone with random timbre, slight vibrato and decay, peak about one."""
    time = np.arange(length) / rate
    vibrato = 1 + 0.003 * np.sin(2 * np.pi * rng.uniform(4, 7) * time + rng.uniform(0, 6))
    phase = 2 * np.pi * np.cumsum(frequency * vibrato) / rate + rng.uniform(0, 2 * np.pi)
    harmonics = np.arange(1, 1 + max(1, int(min(12, rate / 2 // frequency - 1))))
    levels = harmonics ** -rng.uniform(0.6, 2.0) * rng.uniform(0.3, 1.0, len(harmonics))
    wave = (levels[:, None] * np.sin(harmonics[:, None] * phase)).sum(0) * np.exp(-rng.uniform(0, 3) * time)
    return wave / np.abs(wave).max()
