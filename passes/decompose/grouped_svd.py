"""Grouped SVD: a kxk convolution C->k j in k groups, a 1x1 convolution k j->S (ALDS; Liebenwein et al., NeurIPS 2021).

The input channels are cut into k slices of C / k; the unfolding S x (C/k prod kernel) of each gets a truncated SVD of
its own, W_i ~ A_i B_i with j components, and the last stage adds the slices up. k = 1 is `svd`. More slices cost less
per component and share none of them.

Calibrated, B_i spans the best row space for slice i's own block of the second moment, and all A_i are the least-squares
solution on the whole moment, for every j at once. With several slices these B_i are not the best ones, so the data-free
ones get their A_i, too, and every j the better of both.

Weights per group of the layer: j (C prod kernel + k S). The rank is (k, j).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnx_lowrank.chain import Chain, Stage
from onnx_lowrank.decomposition import Decomposition, Factorization, Rank, aligned
from onnx_lowrank.layer import Array, LayerShape
from onnx_lowrank.linalg import NestedFit, singular_values, spectrum, tail, whitened_rows
from onnx_lowrank.passes.decompose.two_stage import balanced
from onnx_lowrank.passes.decompose.whitened import usable


class Slices(Factorization):
    """Singular values of every slice, per number of slices; errors are exact.

    Only values are kept: the vectors of all divisors would be several times the weight.

    Args:
        weight: (g, S, C, *kernel).
    """

    def __init__(self, weight: Array) -> None:
        self._weight = weight
        self._values: dict[int, Array] = {}
        self._largest = float(self._of(1).max(initial=0.0))

    def error(self, rank: Rank) -> float:
        """Relative Frobenius error, exact."""
        return tail(self._of(rank[0]), rank[1])

    def spectral_error(self, rank: Rank) -> float:
        """The bound of ALDS's theorem 1: sqrt(k) max_i sigma_{i,j+1} / ||W||_2; W is the whole unfolding."""
        cut = self._of(rank[0])[:, rank[1] :]
        return math.sqrt(rank[0]) * float(cut.max() / self._largest) if cut.size and self._largest > 0 else 0.0

    def factors(self, rank: Rank) -> tuple[Array, ...]:
        """Weights (g k, j, C/k, *kernel) and (g, S, k j, 1..)."""
        return _stages(self._weight, rank, *spectrum(_slices(self._weight, rank[0])).truncated(rank[1]))

    def _of(self, count: int) -> Array:
        if count not in self._values:
            self._values[count] = singular_values(_slices(self._weight, count))
        return self._values[count]


class CalibratedSlices(Factorization):
    """First stages nested in j, last stages solved in closed form; exact output errors at every rank.

    Args:
        weight: (g, S, C, *kernel).
        gram: Second moments G, (g, n, n).
    """

    def __init__(self, weight: Array, gram: Array) -> None:
        self._weight, self._gram = weight.astype(np.float64, copy=False), gram
        self._matrix = self._weight.reshape(*weight.shape[:2], -1)
        self._product = self._matrix @ gram
        outputs = self._product @ self._matrix.swapaxes(1, 2)
        self._total = float(np.trace(outputs, axis1=1, axis2=2).sum())
        self._largest = float(np.linalg.eigvalsh(outputs).max(initial=0.0))
        self._made: dict[int, tuple[Array, list[tuple[Array, Array]]]] = {}

    def error(self, rank: Rank) -> float:
        """Relative output error sqrt(tr(D G D^T) / tr(M G M^T)), exact."""
        if self._full(rank) or self._total <= 0:
            return 0.0
        explained = self._best(rank)[1]
        return math.sqrt(max(0.0, 1.0 - _at(explained, rank) / self._total))

    def spectral_error(self, rank: Rank) -> float:
        """The same as without second moment, of every slice times the root of its own block of G."""
        values = self._of(rank[0])[0][:, rank[1] :]
        if self._full(rank) or not values.size or self._largest <= 0:
            return 0.0
        return math.sqrt(rank[0]) * float(values.max() / math.sqrt(self._largest))

    def factors(self, rank: Rank) -> tuple[Array, ...]:
        """Weights (g k, j, C/k, *kernel) and (g, S, k j, 1..)."""
        if self._full(rank):
            return _stages(self._weight, rank, *spectrum(_slices(self._weight, rank[0])).truncated(rank[1]))
        count, j = rank
        groups, out = self._matrix.shape[:2]
        rows = self._best(rank)[0][:, :j]
        fits = self._fits(rows.reshape(groups, count, *rows.shape[1:]))
        solved = [fit.solve(count * rows.shape[1]).reshape(-1, count, out).transpose(1, 2, 0) for fit in fits]
        a, b = np.concatenate(solved), rows
        return _stages(self._weight, rank, *balanced(a, b))

    def _best(self, rank: Rank) -> tuple[Array, Array]:
        return max(self._of(rank[0])[1], key=lambda tried: _at(tried[1], rank))

    def _of(self, count: int) -> tuple[Array, list[tuple[Array, Array]]]:
        """Singular values of all slices; calibrated and data-free rows B (g k, J, n/k), each with what j explain."""
        if count not in self._made:
            cut = _slices(self._weight, count)
            groups, size = len(self._matrix), cut.shape[2]
            blocks = self._gram.reshape(groups, count, size, count, size)
            most = min(cut.shape[1:])
            pairs = [whitened_rows(m, blocks[i // count, i % count, :, i % count], most) for i, m in enumerate(cut)]
            rows, values = np.stack([pair[0] for pair in pairs]), np.stack([pair[1] for pair in pairs])
            limit = min(most, max(1, _worthwhile(cut.shape[1], size * count, count)))
            tried = [rows[:, :limit], *([spectrum(cut).truncated(limit)[1]] if count > 1 else [])]
            explained = [self._explained(each.reshape(groups, count, limit, size)) for each in tried]
            self._made[count] = values, list(zip(tried, explained, strict=True))
        return self._made[count]

    def _explained(self, rows: Array) -> Array:
        """Of the outputs' energy, by the first j rows of all slices; rows are (g, k, J, n/k)."""
        energy = sum(np.square(fit.explained).reshape(rows.shape[2], -1).sum(axis=1) for fit in self._fits(rows))
        return np.cumsum(energy)

    def _fits(self, rows: Array) -> list[NestedFit]:
        """Least squares on the features of all slices of each group, in the order (component, slice)."""
        found: list[NestedFit] = []
        for b, gram, product in zip(rows, self._gram, self._product, strict=True):
            count, limit, size = b.shape
            half = (b @ gram.reshape(count, size, -1)).reshape(count, limit, count, size)
            moment = np.einsum("ijqc,qrc->jirq", half, b, optimize=True).reshape(limit * count, -1)
            cross = np.einsum("sqc,qrc->rqs", product.reshape(-1, count, size), b, optimize=True)
            found.append(NestedFit(moment, cross.reshape(limit * count, -1)))
        return found

    def _full(self, rank: Rank) -> bool:
        return rank[1] >= min(self._matrix.shape[1], self._matrix.shape[2] // rank[0])


def _at(explained: Array, rank: Rank) -> float:
    return float(explained[min(rank[1], len(explained)) - 1])


def _slices(weight: Array, count: int) -> Array:
    """The unfoldings S x (C/k prod kernel) of all slices, (g k, S, n/k)."""
    groups, out = weight.shape[:2]
    return weight.reshape(groups, out, count, -1).swapaxes(1, 2).reshape(groups * count, out, -1)


def _stages(weight: Array, rank: Rank, a: Array, b: Array) -> tuple[Array, Array]:
    """Halves (g k, S, j) and (g k, j, n/k) as the weights of two stages; missing components are zero."""
    count, j = rank
    groups, out, in_, *kernel = weight.shape
    missing = j - a.shape[2]
    a, b = np.pad(a, ((0, 0), (0, 0), (0, missing))), np.pad(b, ((0, 0), (0, missing), (0, 0)))
    last = a.reshape(groups, count, out, j).swapaxes(1, 2)
    return b.reshape(-1, j, in_ // count, *kernel), last.reshape(groups, out, count * j, *(1,) * len(kernel))


def _worthwhile(out: int, inputs: int, count: int) -> int:
    """The highest j with fewer weights than the dense layer."""
    return (out * inputs - 1) // (inputs + count * out)


@dataclass(frozen=True)
class GroupedSvd(Decomposition):
    """SVD of k slices of the input channels (ALDS): kxk C->k j in k groups, 1x1 k j->S."""

    name: ClassVar[str] = "grouped_svd"
    on_request: ClassVar[str] = "it has as many chains to time as the input channels have divisors, per rank"
    structure: ClassVar[int] = 1

    def refusal(self, shape: LayerShape) -> str | None:
        """Refuse matrix products, and what has nothing to slice or no rank to cut."""
        if not shape.kernel:
            return f"{shape} is a matrix product: its stages cannot have groups of their own"
        if shape.in_ < 2:
            return f"{shape} has one input channel per group: there is nothing to slice"
        if shape.out < 2:
            return f"{shape} is a vector: there is no rank to cut"
        return None

    def ranks(self, shape: LayerShape, block: int) -> Sequence[Rank]:
        """Every divisor k of C, with the j that have fewer weights than the dense layer."""
        found: list[Rank] = []
        for count in (k for k in range(1, shape.in_ + 1) if shape.in_ % k == 0):
            limit = min(_worthwhile(shape.out, shape.inputs, count), shape.out, shape.inputs // count)
            found.extend((count, j) for j in aligned(limit, block))
        return found

    def chain(self, shape: LayerShape, rank: Rank) -> Chain:
        """Two stages, the first one grouped."""
        count, j = rank
        n = len(shape.kernel)
        kernel, ones = "hwd"[:n], "xyz"[:n]
        return Chain(
            method=self.name,
            stages=(
                Stage(shape.groups * count, j, shape.in_ // count, shape.kernel, tuple(range(n))),
                Stage(shape.groups, shape.out, count * j, (1,) * n),
            ),
            equation=f"(gq)rc{kernel},gs(qr){ones}->gs(qc){kernel}",
        )

    def factorize(self, weight: Array, gram: Array | None = None, *, most: Rank | None = None) -> Factorization:  # noqa: ARG002 - every j comes at once
        """Spectra of the slices, one number of slices at a time, when they are asked for."""
        moment = usable(gram)
        return Slices(weight) if moment is None else CalibratedSlices(weight, moment)

    def exact_rank(self, shape: LayerShape) -> Rank:
        """One slice at full rank."""
        return (1, min(shape.out, shape.inputs))

    def misfit(self, shape: LayerShape, rank: Rank) -> str | None:
        """The number of slices must divide the input channels."""
        if len(rank) == 2 and rank[0] >= 1 and shape.in_ % rank[0] == 0:
            most = min(shape.out, shape.inputs // rank[0])
            return None if 1 <= rank[1] <= most else f"1 to {most} in {rank[0]} groups"
        return f"a divisor of {shape.in_} and a rank"
