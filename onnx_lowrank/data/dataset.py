"""Samples of a model held in memory: batches, choices and disjoint parts of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.data.splitting import held_out
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

    def thinned(self, limit: int | None) -> Dataset:
        """At most `limit` samples, evenly spaced, and a note if that left any out."""
        if limit is None or len(self) <= limit:
            return self
        note = f"{limit} of {len(self)} samples are used, evenly spaced; --samples sets how many"
        return replace(
            self.take(np.linspace(0, len(self) - 1, limit).round().astype(np.intp)), notes=(*self.notes, note)
        )

    def split(self, held_out_fraction: float, seed: int) -> tuple[Dataset, Dataset]:
        """Two disjoint parts drawn at random, the rest and the held-out part, both of whole batches and not empty.

        Where there are two sources or more, each falls into one part as a whole. Of three batches or more, the
        larger part can be split again.

        Raises:
            InputError: if there are not samples enough for two parts.
        """
        held = held_out(len(self), self.sources, self.batch or 1, held_out_fraction, np.random.default_rng(seed))
        rest = np.setdiff1d(np.arange(len(self)), held)
        return self.take(rest).in_whole_batches(), self.take(held).in_whole_batches()

    def in_whole_batches(self) -> Dataset:
        """Without the samples at the end of each part that do not fill a batch.

        Raises:
            InputError: if nothing is left.
        """
        size = self.batch or 1
        kept = tuple(part.take(slice(len(part) - len(part) % size)) for part in self.parts if len(part) >= size)
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
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def _placed(self) -> Iterator[tuple[Part, int]]:
        """Every part and the number of its first sample."""
        start = 0
        for part in self.parts:
            yield part, start
            start += len(part)


def _joined(arrays: Sequence[NDArray[np.generic]]) -> NDArray[np.generic] | None:
    if not arrays:
        return None
    if len({array.shape[1:] for array in arrays}) == 1:
        return np.concatenate(arrays)
    joined = np.empty(sum(map(len, arrays)), dtype=object)
    for row, entry in enumerate(entry for array in arrays for entry in array):
        joined[row] = entry
    return joined
