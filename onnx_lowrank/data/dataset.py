"""Samples of a model held in memory: batches, choices and disjoint parts of them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.data.content import content, fingerprints
from onnx_lowrank.data.splitting import divided
from onnx_lowrank.errors import InputError
from onnx_lowrank.signature import Feeds

LABEL = "label"
SOURCE = "source"
Indices = slice | Sequence[int] | NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Part:
    """Samples that agree in the shape of every input.

    Args:
        arrays: Input name -> (samples, ...), in the input's element type.
        labels: (samples, ...), or None.
        sources: (samples,), the name of what each comes from (a photograph, a document, a speaker), or None.
    """

    arrays: Mapping[str, NDArray[np.generic]]
    labels: NDArray[np.generic] | None = None
    sources: NDArray[np.str_] | None = None

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    @property
    def elements(self) -> int:
        """Values that one sample feeds."""
        return sum(math.prod(array.shape[1:]) for array in self.arrays.values())

    @property
    def named(self) -> dict[str, NDArray[np.generic]]:
        """Inputs by name, then labels and sources where there are any."""
        extras = {LABEL: self.labels, SOURCE: self.sources}
        more = {name: array for name, array in extras.items() if array is not None}
        return dict(sorted(self.arrays.items())) | more

    def take(self, rows: Indices) -> Part:
        """The chosen samples with their labels and sources."""
        arrays = {name: array[rows] for name, array in self.arrays.items()}
        labels = None if self.labels is None else self.labels[rows]
        return Part(arrays, labels, None if self.sources is None else self.sources[rows])


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples that are fed together.

    Args:
        feeds: Input name -> array.
        rows: (samples,), their numbers in the dataset.
        labels: (samples, ...), or None.
    """

    feeds: Feeds
    rows: NDArray[np.intp]
    labels: NDArray[np.generic] | None


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples for every input of a model; those of one shape stand together.

    An array has the rank of its input, the leading axis being the batch; or one axis more, and then each entry is fed
    whole (inputs without a batch axis). The number of samples of a part is a multiple of the batch the model takes.

    Args:
        parts: The samples, by shape.
        whole: Inputs whose entries are fed whole.
        batch: The batch size the signature fixes, or None where any will do.
        origin: Where the samples come from, as the user named it.
        notes: What the user should know: how images were read, and which samples were dropped.
    """

    parts: tuple[Part, ...]
    whole: frozenset[str]
    batch: int | None
    origin: str = ""
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @cached_property
    def labels(self) -> NDArray[np.generic] | None:
        """(samples, ...), or None; (samples,) of arrays where their shapes differ between parts."""
        return _joined([part.labels for part in self.parts if part.labels is not None])

    @cached_property
    def sources(self) -> NDArray[np.str_] | None:
        """(samples,), the name of what each sample comes from, or None."""
        found = [part.sources for part in self.parts if part.sources is not None]
        return np.concatenate(found) if found else None

    def batches(self, batch: int = 1, indices: Indices = slice(None)) -> Iterator[Batch]:
        """The chosen samples, `batch` at a time and never two shapes in one; part by part, else in the order chosen.

        A batch size fixed by the model wins; then incomplete tails of `indices` are not fed.
        """
        order, size = np.arange(len(self))[indices], self.batch or batch
        for part, start in self._placed():
            rows = order[(start <= order) & (order < start + len(part))]
            for first in range(0, len(rows) - (len(rows) % size if self.batch else 0), size):
                chosen = rows[first : first + size]
                inside = chosen - start
                feeds = {n: array[inside[0] if n in self.whole else inside] for n, array in part.arrays.items()}
                yield Batch(feeds, chosen, None if part.labels is None else part.labels[inside])

    def feeds(self, batch: int = 1, indices: Indices = slice(None)) -> Iterator[Feeds]:
        """The feeds of `batches`."""
        return (chosen.feeds for chosen in self.batches(batch, indices))

    def take(self, indices: Indices) -> Dataset:
        """The chosen samples with their labels and sources; in the order chosen within a part."""
        order = np.arange(len(self))[indices]
        chosen = (
            (part, order[(start <= order) & (order < start + len(part))] - start) for part, start in self._placed()
        )
        return replace(self, parts=tuple(part.take(rows) for part, rows in chosen if len(rows)))

    @cached_property
    def fingerprints(self) -> NDArray[np.str_]:
        """(samples,), a hash of what each feeds to the model."""
        return np.concatenate([fingerprints(part.arrays) for part in self.parts])

    def by_content(self, indices: Indices = slice(None)) -> Dataset:
        """The chosen samples by shape, then by fingerprint: an order that no file has a say in."""
        order = np.arange(len(self))[indices]
        chosen = self.take(order[np.argsort(self.fingerprints[order], kind="stable")])
        return replace(chosen, parts=tuple(sorted(chosen.parts, key=_shapes)))

    def thinned(self, limit: int | None) -> Dataset:
        """At most `limit` samples, drawn by their content, and a note if that left any out."""
        if limit is None or len(self) <= limit:
            return self
        note = f"{limit} of {len(self)} samples are used, drawn at random; --samples sets how many"
        return replace(
            self.take(np.sort(np.argsort(self.fingerprints, kind="stable")[:limit])), notes=(*self.notes, note)
        )

    def share(self, fraction: float) -> Dataset:
        """A fraction of the samples, in whole batches and at least one, drawn by their content."""
        size = self.batch or 1
        if size == 1:
            drawn = np.argsort(self.fingerprints, kind="stable")[: max(int(fraction * len(self)), 1)]
            return self.take(np.sort(drawn))
        wanted = [int(fraction * len(part)) // size * size for part in self.parts]
        if not any(wanted):
            wanted[int(np.argmax([len(part) for part in self.parts]))] = size
        chosen = [
            start + np.argsort(self.fingerprints[start : start + len(part)], kind="stable")[:count]
            for (part, start), count in zip(self._placed(), wanted, strict=True)
        ]
        return self.take(np.sort(np.concatenate(chosen)))

    def without(self, others: Dataset) -> Dataset | None:
        """The samples that are not among `others`; None if there are none."""
        rows = np.flatnonzero(~np.isin(self.fingerprints, others.fingerprints))
        return self.take(rows) if len(rows) else None

    def divided(self, fractions: Sequence[float], seed: int) -> tuple[Dataset, ...]:
        """Disjoint parts drawn at random, of whole batches and not empty: the rest, then one per fraction.

        Each source falls into one part as a whole, or a note says why not; see `splitting.divided`. The order of the
        samples makes no difference, and theirs is that of `by_content`.

        Raises:
            InputError: if there are not samples enough.
        """
        order = np.argsort(self.fingerprints, kind="stable")
        sources = None if self.sources is None else self.sources[order]
        rng = np.random.default_rng(seed)
        drawn, note = divided(len(self), sources, self.batch or 1, fractions, rng)
        noted = self if note is None else replace(self, notes=(*self.notes, note))
        return tuple(noted.by_content(order[rows]).in_whole_batches() for rows in drawn)

    def split(self, held_out_fraction: float, seed: int) -> tuple[Dataset, Dataset]:
        """Two parts, see `divided`: the rest, and the held-out part."""
        rest, held = self.divided([held_out_fraction], seed)
        return rest, held

    def in_whole_batches(self) -> Dataset:
        """Without the samples of each part that do not fill a batch; their content decides which.

        Raises:
            InputError: if nothing is left.
        """
        size = self.batch or 1
        kept = tuple(_whole(part, size) for part in self.parts if len(part) >= size)
        if not kept:
            shape = " of one shape" if len(self.parts) > 1 else ""
            raise InputError(
                f"{len(self)} samples in {self.origin}",
                f"at least {size}{shape}, the batch the model fixes",
                "add samples",
            )
        return replace(self, parts=kept)

    @cached_property
    def sha256(self) -> str:
        """Hash of names, types, shapes and values, independent of how the file was packed."""
        digest = hashlib.sha256()
        for part in self.parts:
            for name, array in part.named.items():
                digest.update(f"{name}:{array.dtype}:{array.shape};".encode())
                digest.update(content(array))
        return digest.hexdigest()

    def _placed(self) -> Iterator[tuple[Part, int]]:
        """Every part and the number of its first sample."""
        start = 0
        for part in self.parts:
            yield part, start
            start += len(part)


def _shapes(part: Part) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, array.shape[1:]) for name, array in part.named.items()]


def _whole(part: Part, size: int) -> Part:
    """Without the samples that do not fill a batch."""
    if len(part) % size == 0:
        return part
    return part.take(np.sort(np.argsort(fingerprints(part.arrays), kind="stable")[: len(part) - len(part) % size]))


def _joined(arrays: Sequence[NDArray[np.generic]]) -> NDArray[np.generic] | None:
    if not arrays:
        return None
    if len({array.shape[1:] for array in arrays}) == 1:
        return np.concatenate(arrays)
    joined = np.empty(sum(map(len, arrays)), dtype=object)
    for row, entry in enumerate(entry for array in arrays for entry in array):
        joined[row] = entry
    return joined
