"""Decomposed weights, kept: in memory up to a limit, beyond it on disk for as long as the search runs."""

from __future__ import annotations

import contextlib
import itertools
import logging
import pickle
import shutil
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import joblib
import numpy as np

from onnx_lowrank.decomposition import Decomposition, Factorization, Rank
from onnx_lowrank.layer import Array, Layer
from onnx_lowrank.row_space import factorized

logger = logging.getLogger(__name__)
Key = tuple[str, str]


class FactorizationCache(Mapping[Key, Factorization]):
    """Factorizations by (layer key, method).

    Together they take several times the model. The least recently used ones beyond `limit_bytes` are written to
    `folder`, a private one that its owner removes, while half of the disk space free at first remains; after that they
    are forgotten, and made again when a plan needs them. What cannot be pickled stays in memory.
    """

    def __init__(self, limit_bytes: int, folder: Path) -> None:
        self.limit_bytes, self.folder = limit_bytes, folder
        self._reserve = shutil.disk_usage(folder).free // 2
        self._held: OrderedDict[Key, tuple[Factorization, int]] = OrderedDict()
        self._spilled: dict[Key, Path | Factorization] = {}
        self._calibrated: set[Key] = set()
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    def __getitem__(self, key: Key) -> Factorization:
        """The factorization, read back if it was spilled; what is read back does not displace what is held."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key][0]
            found = self._spilled[key]
        return joblib.load(found) if isinstance(found, Path) else found

    def __iter__(self) -> Iterator[Key]:
        """Keys of what is held or spilled."""
        with self._lock:
            return iter([*self._held, *self._spilled])

    def __len__(self) -> int:
        """How many are held or spilled."""
        return len(self._held) + len(self._spilled)

    def make(
        self,
        layer: Layer,
        method: Decomposition,
        weight: Array | None = None,
        gram: Array | None = None,
        ranks: Sequence[Rank] = (),
    ) -> Factorization:
        """The factorization of `layer` by `method`, made if need be; `weight` saves reading it again.

        One made with `gram` is never forgotten: it could not be made again. `ranks` are fitted before it is kept: what
        is written to the disk meanwhile would lack them.
        """
        key = (layer.key, method.name)
        with contextlib.suppress(KeyError):
            return self[key]
        made = factorized(method, layer.read() if weight is None else weight, gram)
        for rank in ranks if method.by_rank else ():
            made.error(rank)
        if gram is not None:
            self._calibrated.add(key)
        evicted: list[tuple[Key, Factorization]] = []
        with self._lock:
            self._held[key] = (made, array_bytes(made))
            while len(self._held) > 1 and sum(size for _, size in self._held.values()) > self.limit_bytes:
                old, (factorization, _) = self._held.popitem(last=False)
                evicted.append((old, factorization))
        for old, factorization in evicted:
            self._spill(old, factorization)
        return made

    def _spill(self, key: Key, factorization: Factorization) -> None:
        path = self.folder / f"factorization{next(self._numbers)}"
        if key not in self._calibrated and shutil.disk_usage(self.folder).free < self._reserve:
            return
        kept: Path | Factorization = path
        try:
            joblib.dump(factorization, path)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            logger.info("%s of %s stays in memory (%s)", key[1], key[0], error)
            path.unlink(missing_ok=True)
            kept = factorization
        except OSError as error:
            if key in self._calibrated:
                raise
            logger.info("%s of %s is not kept (%s)", key[1], key[0], error)
            path.unlink(missing_ok=True)
            return
        with self._lock:
            self._spilled[key] = kept


def array_bytes(holder: object) -> int:
    """Bytes of the arrays that an object holds, each once; what several objects share counts for each of them."""
    found: dict[int, int] = {}
    seen: set[int] = set()
    left = [holder]
    while left:
        at = left.pop()
        if id(at) in seen:
            continue
        seen.add(id(at))
        if isinstance(at, np.ndarray):
            owner = at if at.base is None else at.base
            found[id(owner)] = getattr(owner, "nbytes", at.nbytes)
        elif isinstance(at, Mapping):
            left.extend(at.values())
        elif isinstance(at, (list, tuple)):
            left.extend(at)
        else:
            left.extend(getattr(at, "__dict__", {}).values())
    return sum(found.values())
