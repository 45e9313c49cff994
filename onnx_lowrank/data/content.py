"""What a sample holds, as a short text: equal for equal samples, whatever their place in a file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

_BYTES = 16  # 128 bits: two samples that differ never share a fingerprint in practice


def content(array: NDArray[np.generic]) -> bytes:
    """The values of an array, also where it holds texts, whose own bytes are addresses."""
    return repr(array.tolist()).encode() if array.dtype == object else np.ascontiguousarray(array).tobytes()


def fingerprints(arrays: Mapping[str, NDArray[np.generic]]) -> NDArray[np.str_]:
    """One BLAKE2b hash (RFC 7693) per sample of all its inputs, (samples,); axes of one entry do not count.

    Args:
        arrays: Input name -> (samples, ...).
    """
    named = sorted(arrays.items())
    shapes = "".join(f"{name}:{array.dtype}:{[n for n in array.shape[1:] if n != 1]};" for name, array in named)
    count = len(named[0][1])
    return np.array(
        [_digest(shapes, *(content(array[i : i + 1]) for _, array in named)) for i in range(count)], dtype=np.str_
    )


def _digest(shapes: str, *values: bytes) -> str:
    digest = hashlib.blake2b(shapes.encode(), digest_size=_BYTES)
    for value in values:
        digest.update(value)
    return digest.hexdigest()
