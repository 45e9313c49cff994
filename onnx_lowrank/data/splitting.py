"""Disjoint parts of samples: at random, and by whole sources, as crops of one photograph would tell of each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.errors import InputError

Numbers = NDArray[np.intp]
_DRAWS = 16
# Sources are divided after all where a part of whole ones would be less than this share of what it should be.
_SMALLEST = 1 / 4
# Draws that are off by less than this share of the samples are as good as each other.
_NEAR = 1 / 20


def divided(
    count: int, sources: NDArray[np.str_] | None, batch: int, fractions: Sequence[float], rng: np.random.Generator
) -> tuple[list[Numbers], str | None]:
    """Numbers of the samples of disjoint parts, ascending, the rest first; and a note where parts share sources.

    Every part has sources of its own, unless there are fewer sources than parts, or too unequal ones: then samples
    are drawn whatever they come from.

    Args:
        count: Samples there are.
        sources: (count,), what each comes from, or None.
        batch: Samples a model takes at a time; no part is smaller.
        fractions: Wanted shares of the parts beside the rest.
        rng: Draws them.

    Raises:
        InputError: if there are not samples enough.
    """
    wanted = _wanted(count, batch, fractions)
    if sources is None:
        return _drawn(wanted, rng), None
    names, member, sizes = np.unique(sources, return_inverse=True, return_counts=True)
    dealt = _by_source(sizes, wanted, batch, rng)
    if dealt is not None:
        return [np.flatnonzero(np.isin(member, part)) for part in dealt], None
    found = "1 source, too few" if len(names) == 1 else f"{len(names)} sources, too few or too unequal"
    note = f"{count} samples of {found} for {len(wanted)} parts: samples of one source are on both sides of the split"
    return _drawn(wanted, rng), note


def _wanted(count: int, batch: int, fractions: Sequence[float]) -> list[int]:
    """Samples per part, the rest first: whole batches in the others, and one batch at least in each."""
    batches, parts = count // batch, len(fractions) + 1
    if batches < parts:
        raise InputError(f"{count} samples", f"at least {parts * batch} to hold some out", "give more samples")
    held = [max(round(batches * fraction), 1) for fraction in fractions]
    while sum(held) >= batches:
        held[held.index(max(held))] -= 1
    return [count - sum(held) * batch, *(number * batch for number in held)]


def _drawn(wanted: Sequence[int], rng: np.random.Generator) -> list[Numbers]:
    order = rng.permutation(sum(wanted))
    return [np.sort(part) for part in np.split(order, np.cumsum(wanted)[:-1])]


def _by_source(sizes: Numbers, wanted: Sequence[int], batch: int, rng: np.random.Generator) -> list[list[int]] | None:
    """The sources of every part, of some draws the one nearest to `wanted`; None if a part is too small in all."""
    # The largest first comes nearest where sources are unequal, but would always hold out the smallest.
    orders = [*(rng.permutation(len(sizes)) for _ in range(_DRAWS)), np.argsort(-sizes, kind="stable")]
    best: tuple[int, list[list[int]]] | None = None
    for order in orders if len(sizes) >= len(wanted) else ():
        parts = _dealt(order.tolist(), sizes, wanted)
        held = [int(sizes[part].sum()) for part in parts]
        off = int(sum(abs(has - want) for has, want in zip(held, wanted, strict=True)) / (_NEAR * sum(wanted)))
        large = all(has >= max(batch, _SMALLEST * want) for has, want in zip(held, wanted, strict=True))
        if large and (best is None or off < best[0]):
            best = off, parts
    return None if best is None else best[1]


def _dealt(order: Sequence[int], sizes: Numbers, wanted: Sequence[int]) -> list[list[int]]:
    """Sources one after the other to the part that lacks most; the last ones to parts that have none yet."""
    parts: list[list[int]] = [[] for _ in wanted]
    lacks = list(wanted)
    for left, source in zip(range(len(order), 0, -1), order, strict=True):
        empty = [number for number, part in enumerate(parts) if not part]
        among = empty if left <= len(empty) else range(len(parts))
        chosen = max(among, key=lambda number: lacks[number])
        parts[chosen].append(source)
        lacks[chosen] -= int(sizes[source])
    return parts
