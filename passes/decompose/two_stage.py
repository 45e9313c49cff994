"""What every two-stage spectral method shares: cut one unfolding of the weight, put each half into one stage.

The kernel's spatial axes are divided between the stages: the first carries the axes F, the last the axes L. With
rows (s, k_L) and columns (c, k_F) the weight is a matrix M, and the truncated SVD M ~ A B is the best chain of its form
in the Frobenius norm (Eckart-Young). Everything else is reshaping:

    stage 1: C -> r, kernel k_F, weights B;    stage 2: r -> S, kernel k_L, weights A.

Weights per group: r (C prod k_F + S prod k_L).

Calibrated, the metric is the output error: B spans the best row space for the inputs' second moment averaged over k_L,
and A is the least-squares solution on the whole moment (passes.decompose.whitened). With several positions in k_L that
B is not the best one, so the data-free B gets its A, too, and every rank the better of both.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import numpy as np

from onnx_lowrank.chain import Chain, Stage
from onnx_lowrank.decomposition import Decomposition, Factorization, Rank, aligned
from onnx_lowrank.layer import Array, LayerShape, Shape
from onnx_lowrank.linalg import Spectrum, spectrum
from onnx_lowrank.passes.decompose.whitened import Whitened, arrange, usable


class UnfoldingCut(Factorization):
    """An unfolding decomposed once; its errors are exact at every rank."""

    def __init__(self, cut: Spectrum, first: Shape, last: Shape) -> None:
        self._cut, self._first, self._last = cut, first, last

    def error(self, rank: Rank) -> float:
        """Relative Frobenius error, exact."""
        return self._cut.tail(rank[0])

    def spectral_error(self, rank: Rank) -> float | None:
        """First singular value cut, relative to the largest, where the unfolding is that of the outputs."""
        return self._cut.next_value(rank[0]) if _of_outputs(self._last) else None

    def factors(self, rank: Rank) -> tuple[Array, ...]:
        """Weights (g, r, C, *k_F) and (g, S, r, *k_L)."""
        return _stages(*self._cut.truncated(rank[0]), self._first, self._last)


class _Nested:
    """Rows B (g, R, F) with their least squares: what the first r of them explain, and the last stages.

    Args:
        groups: Weight and second moment of each group; not kept.
        rows: B.
    """

    def __init__(self, groups: Sequence[Whitened], rows: Array) -> None:
        self._rows, self._last = rows, (len(groups[0].weight), groups[0].positions)
        self._fits = [group.fit(each) for group, each in zip(groups, rows, strict=True)]
        energy = sum(np.square(fit.explained).sum(axis=1) for fit in self._fits)
        self.explained = np.cumsum(np.reshape(energy, (rows.shape[1], -1)).sum(axis=1))

    def factors(self, rank: int) -> tuple[Array, Array]:
        """A (g, S k_L, r) and B (g, r, F); beyond the rows there are, zeros."""
        groups, most, inputs = self._rows.shape
        count = min(rank, most)
        out, positions = self._last
        b, a = np.zeros((groups, rank, inputs)), np.zeros((groups, out * positions, rank))
        b[:, :count] = self._rows[:, :count]
        for solved, fit in zip(a, self._fits, strict=True):
            coefficients = fit.solve(count * positions).reshape(count, positions, -1)
            solved[:, :count] = coefficients.transpose(2, 1, 0).reshape(-1, count)
        return balanced(a, b)


class CalibratedCut(Factorization):
    """First stages nested in the rank, last stages solved in closed form; exact output errors at every rank.

    Beyond `most`, where the chain has more weights than the layer, the error stays what it is and the factors are
    padded with zeros; at full rank they are the weight itself.

    Args:
        unfolding: M, (g, S k_L, C k_F).
        groups: Weight and second moment of each group; not kept.
        most: Highest rank solved for.
        first: Weight shape of the first stage, its output channels left out: (g, 0, C, *k_F).
        last: Shape (g, S, *k_L).
    """

    def __init__(self, unfolding: Array, groups: Sequence[Whitened], most: int, first: Shape, last: Shape) -> None:
        self._unfolding, self._first, self._last = unfolding, first, last
        bases = [group.rows(most) for group in groups]
        self._values = np.stack([values for _, values in bases])
        self._total = sum(group.total for group in groups)
        self._tried = [_Nested(groups, np.stack([rows for rows, _ in bases]))]
        if not _of_outputs(last):
            self._tried.append(_Nested(groups, spectrum(unfolding).truncated(most)[1]))
        self._most = most

    def error(self, rank: Rank) -> float:
        """Relative output error sqrt(tr(D G D^T) / tr(M G M^T)), exact."""
        if self._full(rank) or self._total <= 0:
            return 0.0
        return math.sqrt(max(0.0, 1.0 - self._explained(self._best(rank), rank) / self._total))

    def spectral_error(self, rank: Rank) -> float | None:
        """First singular value of M G^(1/2) that is cut, relative to the largest, where M is the output unfolding."""
        if not _of_outputs(self._last):
            return None
        largest = self._values.max(initial=0.0)
        if self._full(rank) or largest <= 0:
            return 0.0
        return float(self._values[:, min(rank[0], self._most, self._values.shape[1] - 1)].max() / largest)

    def factors(self, rank: Rank) -> tuple[Array, ...]:
        """Weights (g, r, C, *k_F) and (g, S, r, *k_L)."""
        if self._full(rank):
            return _stages(*_trivial(self._unfolding), self._first, self._last)
        a, b = self._best(rank).factors(rank[0])
        return _stages(a, b, self._first, self._last)

    def _best(self, rank: Rank) -> _Nested:
        return max(self._tried, key=lambda nested: self._explained(nested, rank))

    def _explained(self, nested: _Nested, rank: Rank) -> float:
        return float(nested.explained[min(rank[0], self._most) - 1])

    def _full(self, rank: Rank) -> bool:
        return rank[0] >= min(self._unfolding.shape[1:])


def _of_outputs(last: Shape) -> bool:
    """Whether the first stage carries the whole kernel."""
    return math.prod(last[2:]) == 1


def _stages(a: Array, b: Array, first: Shape, last: Shape) -> tuple[Array, Array]:
    """Halves (g, S k_L, r) and (g, r, C k_F) as the weights of two stages."""
    groups, out, *kernel = last
    rank = a.shape[2]
    weight = a.reshape(groups, out, -1, rank).swapaxes(2, 3)
    return b.reshape(groups, rank, *first[2:]), weight.reshape(groups, out, rank, *kernel)


def balanced(a: Array, b: Array) -> tuple[Array, Array]:
    """The scale of each component shared evenly, so that both factors stay in range in half precision."""
    left, right = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=2)
    used = (left > 0) & (right > 0)
    scale = np.sqrt(np.divide(left, right, out=np.ones_like(left), where=used))
    scale = np.where(used, scale, 1.0)
    return a / scale[:, None, :], b * scale[:, :, None]


def _trivial(matrix: Array) -> tuple[Array, Array]:
    """M (g, m, n) as M I or I M: full rank without rounding error."""
    groups, rows, columns = matrix.shape
    eye = np.broadcast_to(np.eye(min(rows, columns)), (groups, *(min(rows, columns),) * 2))
    return balanced(eye, matrix) if rows <= columns else balanced(matrix, eye)


class TwoStage(Decomposition):
    """Base of svd and spatial_svd: subclasses say which spatial axes the first stage carries."""

    @abstractmethod
    def first_axes(self, kernel: Shape) -> Shape:
        """Spatial axes the first stage carries."""

    def _halves(self, shape: LayerShape) -> tuple[Shape, Shape]:
        """Kernels of the first and the last stage."""
        mine = self.first_axes(shape.kernel)
        first = tuple(k if axis in mine else 1 for axis, k in enumerate(shape.kernel))
        last = tuple(1 if axis in mine else k for axis, k in enumerate(shape.kernel))
        return first, last

    def _worthwhile(self, shape: LayerShape) -> int:
        """The highest rank with fewer weights than the dense layer."""
        first, last = self._halves(shape)
        per_rank = shape.in_ * math.prod(first) + shape.out * math.prod(last)
        limit = (shape.out * shape.inputs - 1) // per_rank
        return min(limit, self.exact_rank(shape)[0])

    def ranks(self, shape: LayerShape, block: int) -> Sequence[Rank]:
        """Ranks with fewer weights than the dense layer."""
        return [(rank,) for rank in aligned(self._worthwhile(shape), block)]

    def chain(self, shape: LayerShape, rank: Rank) -> Chain:
        """The two stages."""
        mine = self.first_axes(shape.kernel)
        rest = tuple(axis for axis in range(len(shape.kernel)) if axis not in mine)
        first, last = self._halves(shape)
        inner = "hwd"[: len(shape.kernel)]
        outer = inner.upper()
        result = "".join(inner[axis] if axis in mine else outer[axis] for axis in range(len(shape.kernel)))
        return Chain(
            method=self.name,
            stages=(
                Stage(shape.groups, rank[0], shape.in_, first, mine),
                Stage(shape.groups, shape.out, rank[0], last, rest),
            ),
            equation=f"grc{inner},gsr{outer}->gsc{result}",
        )

    def factorize(self, weight: Array, gram: Array | None = None, *, most: Rank | None = None) -> Factorization:
        """SVD of the unfolding (S prod k_L) x (C prod k_F) of every group; whitened if there is a second moment."""
        groups, out, in_, *kernel = weight.shape
        mine = self.first_axes(tuple(kernel))
        rest = [axis for axis in range(len(kernel)) if axis not in mine]
        shape = LayerShape(groups, out, in_, tuple(kernel))
        first, last = self._halves(shape)
        stages = (groups, 0, in_, *first), (groups, out, *last)
        order = (0, 1, *(3 + axis for axis in rest), 2, *(3 + axis for axis in mine))
        matrix = weight.transpose(order).reshape(groups, out * math.prod(last), -1)
        moment = usable(gram)
        if moment is None:
            return UnfoldingCut(spectrum(matrix), *stages)
        index = np.arange(math.prod(weight.shape[2:])).reshape(weight.shape[2:])
        index = index.transpose([axis - 2 for axis in order[2:]]).reshape(math.prod(last), -1)
        highest = min(most[0] if most else max(1, self._worthwhile(shape)), self.exact_rank(shape)[0])
        return CalibratedCut(matrix, arrange(weight, moment, index), highest, *stages)

    def exact_rank(self, shape: LayerShape) -> Rank:
        """The smaller side of the unfolding."""
        first, last = self._halves(shape)
        return (min(shape.in_ * math.prod(first), shape.out * math.prod(last)),)
