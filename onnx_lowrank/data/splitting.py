"""Which samples to hold out: at random, and by whole sources, as crops of one photograph would tell of each other."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.errors import InputError

_DRAWS = 16


def held_out(
    count: int, sources: NDArray[np.str_] | None, batch: int, fraction: float, rng: np.random.Generator
) -> NDArray[np.intp]:
    """Numbers of the samples to hold out, ascending; neither they nor the rest are fewer than a batch.

    Args:
        count: Samples there are.
        sources: (count,), what each comes from, or None. Two sources or more are never divided.
        batch: Samples a model takes at a time.
        fraction: Wanted share of the samples.
        rng: Draws them.

    Raises:
        InputError: if there are not samples enough.
    """
    batches = count // batch
    if batches < 2:
        raise InputError(f"{count} samples", f"at least {2 * batch} to hold some out", "give more samples")
    wanted = min(max(round(batches * fraction), 1), batches - 1) * batch
    names, member, sizes = np.unique(np.zeros(count) if sources is None else sources, return_inverse=True,
                                     return_counts=True)  # fmt: skip
    if len(names) < 2:
        return np.sort(rng.permutation(count)[:wanted])
    drawn = _sources(sizes, wanted, batch, rng)
    if drawn is None:
        found = f"{count} samples of {len(names)} sources, too unequal for batches of {batch}"
        raise InputError(found, "sources for two parts of whole batches", "give samples of more sources")
    return np.flatnonzero(np.isin(member, drawn))


def _sources(sizes: NDArray[np.intp], wanted: int, batch: int, rng: np.random.Generator) -> NDArray[np.intp] | None:
    """The sources, of some random draws, whose samples are closest to `wanted`; None if a part stays below a batch."""
    total = int(sizes.sum())
    best: tuple[int, NDArray[np.intp]] | None = None
    for _ in range(_DRAWS):
        order = rng.permutation(len(sizes))
        for number, held in enumerate(np.cumsum(sizes[order])[:-1].tolist(), start=1):
            for chosen, size in ((order[:number], held), (order[number:], total - held)):
                score = abs(size - wanted)
                if batch <= size <= total - batch and (best is None or score < best[0]):
                    best = score, chosen
    return None if best is None else best[1]
