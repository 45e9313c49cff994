"""Einsum over named axes: the equation of a chain, taken apart and put together again. Arrays only."""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from onnx_lowrank.layer import Array


def contract(terms: Sequence[tuple[str, Array]], result: str, sizes: Mapping[str, int]) -> Array:
    """Einsum of arrays given with the letters of their axes; what `result` alone has is repeated along.

    Args:
        terms: Letters and array of each operand.
        result: Letters of the result.
        sizes: Length of every axis by its letter.
    """
    present = {letter for letters, _ in terms for letter in letters}
    operands = [*terms, *((letter, np.ones(sizes[letter])) for letter in result if letter not in present)]
    if not operands:
        return np.ones(())
    equation = ",".join(letters for letters, _ in operands) + "->" + result
    return np.einsum(equation, *(array for _, array in operands), optimize=True)


def unused(letters: Iterable[str]) -> Iterator[str]:
    """Letters for einsum that are not among `letters`."""
    taken = set(letters)
    return (letter for letter in string.ascii_letters if letter not in taken)
