"""Einsum over named axes: the equation of a chain, taken apart and put together again. Arrays only."""

from __future__ import annotations

import string
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np

from onnx_lowrank.layer import Array

Term = tuple[str, Array]


def contract(terms: Sequence[Term], result: str, sizes: Mapping[str, int]) -> Array:
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


def second_moment(
    terms: Sequence[Term], letter: str, tied: Collection[str], inputs: str, moment: Array, sizes: Mapping[str, int]
) -> Array:
    """Second moment along one letter of a product of arrays: J G J^T, traced over the tied letters.

    Terms that nothing but `letter` links have moments of their own, whose product it is, entry by entry: for CP's
    depthwise stage (B^T G B) * (A^T A), where the whole would hold R x S x C numbers.

    Terms that no summed letter links to `letter` are squared by themselves and absorbed by G first: einsum's greedy
    path forms outer products with them, six hundred times slower for a tensor train of 64 channels.

    Args:
        terms: Letters and array of each factor of J.
        letter: The rows.
        tied: Letters that are the same on both sides.
        inputs: Letters that G is over.
        moment: G, one axis per letter of `inputs`, twice.
        sizes: Length of every axis by its letter.
    """
    parts = _apart(terms, letter, inputs)
    if len(parts) > 1 and inputs:
        with_inputs = [any(set(inputs) & set(letters) for letters, _ in part) for part in parts]
        moments = [
            second_moment(part, letter, tied, inputs if has else "", moment if has else np.ones(()), sizes)
            for part, has in zip(parts, with_inputs, strict=True)
        ]
        return np.prod(moments, axis=0)
    fresh = unused(sizes)
    primed = {x: x if x in tied else next(fresh) for x in sizes}

    def both(parts: Sequence[Term]) -> list[Term]:
        return [*parts, *(("".join(primed[x] for x in letters), array) for letters, array in parts)]

    def twice(letters: str) -> str:
        return letters + "".join(primed[x] for x in letters)

    linked, near = {letter}, list[Term]()
    far = list(terms)
    while found := [term for term in far if linked & set(term[0])]:
        near += found
        far = [term for term in far if not linked & set(term[0])]
        linked |= {x for letters, _ in found for x in letters if x not in inputs and x not in tied}
    here, there = ({x for letters, _ in part for x in letters} for part in (near, far))
    common = "".join(x for x in sizes if x in tied and x in here and x in there)
    apart, seen = ("".join(x for x in inputs if x in part) for part in (there, here))
    middle = [(twice(inputs), moment)]
    if far:
        middle.append((twice(apart) + common, contract(both(far), twice(apart) + common, sizes)))
    within = (twice(seen) + common, contract(middle, twice(seen) + common, sizes))
    kept = letter + "".join(x for x in sizes if x != letter and x in tied and x in here) + seen
    rows = (kept, contract(near, kept, sizes))
    return contract([rows, within, both([rows])[1]], twice(letter), sizes)


def _apart(terms: Sequence[Term], letter: str, inputs: str) -> list[list[Term]]:
    """Terms that share a letter other than `letter`, or have inputs, stay together."""
    parts: list[tuple[set[str], list[Term]]] = []
    for term in terms:
        letters = set(term[0]) - {letter}
        if letters & set(inputs):
            letters |= set(inputs)
        linked = [part for part in parts if part[0] & letters]
        parts = [part for part in parts if not part[0] & letters]
        parts.append((letters.union(*(seen for seen, _ in linked)), [*(t for _, held in linked for t in held), term]))
    return [held for _, held in parts]


def unused(letters: Iterable[str]) -> Iterator[str]:
    """Letters for einsum that are not among `letters`.

    Raises:
        ValueError: once all of them were given.
    """
    taken, every = set(letters), string.ascii_letters
    yield from (letter for letter in every if letter not in taken)
    raise ValueError(f"got an einsum with more axes than there are letters; expected at most {len(every)}")
