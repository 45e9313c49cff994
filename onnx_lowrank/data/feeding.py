"""Samples from a function of the user's: `def samples() -> Iterable[dict[str, ndarray]]`, any number of feeds.

Each feed is what the model takes: input name -> array with its batch axis, and maybe `label` and `source` of as many
samples. If the arrays of any feed do not agree in their leading axis, each feed is one sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import cast

import numpy as np

from onnx_lowrank.data.dataset import Dataset
from onnx_lowrank.data.fitting import Arrays, Signature, fitted, gathered
from onnx_lowrank.errors import InputError
from onnx_lowrank.user_function import described, user_function


def read_function(name: str, signature: Signature, limit: int | None) -> Dataset:
    """Samples of the function `name`; no more feeds are asked for than `limit` samples need, and once only.

    Raises:
        InputError: if it fails, yields something else, or a feed does not fit.
    """
    feeds = _taken(_feeds(name, signature), signature, limit)
    if any(_size(feed, signature) is None for feed in feeds):
        feeds = [_as_one(feed, signature) for feed in feeds]
    places = [f"feed {number} of {name}" for number in range(len(feeds))]
    found = [(where, fitted(where, feed, signature)) for where, feed in zip(places, feeds, strict=True)]
    return gathered(name, found, signature).take(slice(limit)).in_whole_batches()


def _feeds(name: str, signature: Signature) -> Iterator[Arrays]:
    """What the function yields, checked to be feeds."""
    ranks = {spec.name: (len(spec.shape), spec) for spec in signature}
    for number, feed in enumerate(_yielded(name)):
        where = f"feed {number} of {name}"
        if not isinstance(feed, Mapping):
            raise InputError(f"{where} of type {type(feed).__name__}", "a dict of arrays by input name", "yield dicts")
        try:
            arrays = {str(key): np.asarray(value) for key, value in cast(Mapping[object, object], feed).items()}
        except ValueError as error:  # lists of different lengths
            raise InputError(f"{where} ({error})", "arrays by input name", "yield arrays") from error
        for key, array in arrays.items():
            rank, spec = ranks.get(key, (array.ndim, None))
            if array.ndim != rank:
                raise InputError(
                    f"{key!r} with {array.ndim} axes in {where}", f"the input {spec}", "yield what it takes"
                )
        yield arrays


def _yielded(name: str) -> Iterator[object]:
    function = user_function(name)
    try:
        yield from cast(Iterable[object], function())
    except Exception as error:  # it is the user's code, which may raise anything
        right = "a function without arguments that yields feeds"
        raise InputError(f"{name}, which failed ({described(error)})", right, "mend it") from error


def _taken(feeds: Iterable[Arrays], signature: Signature, limit: int | None) -> list[Arrays]:
    taken: list[Arrays] = []
    count = 0
    for feed in feeds:
        taken.append(feed)
        count += _size(feed, signature) or 1
        if limit is not None and count >= limit:
            break
    return taken


def _size(feed: Arrays, signature: Signature) -> int | None:
    """Number of samples of a feed; None if its arrays do not agree, so that it can only be one sample."""
    arrays = [feed[spec.name] for spec in signature if spec.name in feed]
    sizes = {len(array) if array.ndim else None for array in arrays}
    return sizes.pop() if len(sizes) == 1 else None


def _as_one(feed: Arrays, signature: Signature) -> Arrays:
    inputs = {spec.name for spec in signature}
    return {
        name: array if name not in inputs and array.shape[:1] == (1,) else array[None] for name, array in feed.items()
    }
