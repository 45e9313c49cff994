"""Scores against the original's own outputs, for models without labelled data. Each is (numerator, denominator)."""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Ratio: TypeAlias = tuple[NDArray[np.float64], NDArray[np.float64]]


def top1(outputs: NDArray[Any], reference: NDArray[Any]) -> Ratio:
    """Share of samples (n, classes) given the same class."""
    return hits(outputs.argmax(1) == reference.argmax(1))


def hits(right: NDArray[np.bool_]) -> Ratio:
    """Share of samples that are right."""
    return right.astype(np.float64), np.ones(len(right))


def dice(found: NDArray[np.bool_], truth: NDArray[np.bool_]) -> Ratio:
    """F1 of marked places (n, ...): twice the common ones over all."""
    axes = tuple(range(1, found.ndim))
    return 2.0 * (found & truth).sum(axes), (found.sum(axes) + truth.sum(axes)).astype(np.float64)


def concordance(scores: NDArray[Any], reference: NDArray[Any]) -> Ratio:
    """Share of pairs in the batch that two scorings (n,) order alike (Kendall's tau is twice that less one)."""
    same = np.sign(scores[:, None] - scores) == np.sign(reference[:, None] - reference)
    np.fill_diagonal(same, val=False)
    return same.sum(1, dtype=np.float64), np.full(len(scores), len(scores) - 1.0)
