"""CP: a 1x1 convolution C->R, depthwise convolutions that carry the kernel, a 1x1 convolution R->S.

`cp` keeps the kernel whole (3-way tensor S x C x prod kernel): R (C + prod kernel + S) weights. `cp_spatial` has a
depthwise convolution per spatial axis (4-way in two dimensions; Lebedev et al., ICLR 2015): R (C + kh + kw + S).

Fitted by alternating least squares with a small ridge, from the terms of the next lower of 2^n, 3 2^n (and from random
starts where asked for). Where the terms have grown nevertheless they are corrected at an error at most 1 % larger (Phan
et al., ECCV 2020; see `cp_als`). What is still degenerate then is not used: its rank gets the terms of a lower one.

Ranks end at half of the layer's weights, at a third in wide layers: fits beyond take longer than all others together.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from threadpoolctl import threadpool_limits

from onnx_lowrank.chain import Chain, Stage
from onnx_lowrank.decomposition import Decomposition, Factorization, Rank, require_counts
from onnx_lowrank.layer import Array, LayerShape, Shape
from onnx_lowrank.passes.decompose.cp_als import Problem, Terms, exact_terms
from onnx_lowrank.passes.decompose.mixing import IN_CHANNELS, MixingFit
from onnx_lowrank.passes.decompose.whitened import Channels

LIMIT, CALM = 10.0, 2.0  # sum ||term||^2 / ||W||^2: above the first terms are corrected, down to the second if they can
SLACK = 0.01
RIDGE = 3e-3  # at 1e-3 and 1e-2 HED's layers take half the time of none, with terms a third as large or less
POLISH = 2  # sweeps without it at the end
WIDE = 1 << 18  # weights beyond which ranks are fewer


class CpFit(MixingFit):
    """CP terms of every group at the ranks asked for.

    Args:
        method: The format.
        weight: (g, S, C, *kernel).
        gram: Second moments (g, n, n) or None, see `Decomposition.factorize`.
        most: The only rank that will be asked for: lower ones are not fitted to `gram` then, unless it degenerates.
    """

    def __init__(self, method: CpBase, weight: Array, gram: Array | None, most: Rank | None = None) -> None:
        super().__init__(method, weight, gram, most)
        self.cp = method
        groups, out, in_ = weight.shape[:3]
        sizes = [math.prod(self.shape.kernel[axis] for axis in axes) for axes in method.axes(self.shape)]
        self._problems = [Problem(group) for group in self.weight.reshape(groups, out, in_, *sizes)]
        self._terms: dict[int, list[Terms]] = {}

    def fit(self, rank: Rank) -> tuple[Array, ...]:
        """Terms from the next lower rank of `ladder` and from random starts, corrected where they have grown."""
        with threadpool_limits(1):  # products this small take twice as long on two hyperthreads of one core
            return self._stages(self._at(rank[0]))

    def lower(self, rank: Rank) -> Sequence[Rank]:
        """2^n and 3 2^n: what a rank is fitted to depends on nothing that was asked for before."""
        return [(r,) for r in self._ladder(rank[0])]

    def exact(self) -> tuple[Array, ...]:
        """One term per fibre along the longest axis."""
        return self._stages([exact_terms(problem.tensor) for problem in self._problems])

    def in_channels(self, rank: Rank, factors: Sequence[Array], channels: Channels) -> tuple[Array, ...]:
        """The terms of W R after a few sweeps with the ridge, their vectors of the input channels taken back."""
        (count,), groups = rank, self.shape.groups
        first, *taps = (array.reshape(groups, count, -1).swapaxes(1, 2) for array in factors[:-1])
        last = factors[-1].reshape(groups, -1, count)
        weights = channels.weight.reshape(groups, *self._problems[0].tensor.shape)
        sweeps = min(IN_CHANNELS, self.cp.sweeps)
        found: list[Terms] = []
        with threadpool_limits(1):
            for group, parts in enumerate(zip(last, first, *taps, strict=True)):
                outputs, inputs, *others = parts
                terms = Terms(np.ones(count), (outputs, channels.into(group, inputs.T).T, *others))
                problem = Problem(weights[group])
                swept = problem.als([terms], sweeps, ridge=RIDGE) if problem.norm > 0 else terms
                back = channels.back(group, swept.factors[1].T).T
                found.append(replace(swept, factors=(swept.factors[0], back, *swept.factors[2:])))
        return self._stages(found)

    def usable(self, rank: Rank, factors: Sequence[Array]) -> bool:  # noqa: ARG002 - the factors say it
        """Whether the terms do not cancel: sum ||term||^2 is at most 10 ||W||^2."""
        return self._grown(factors) <= LIMIT

    def note(self, rank: Rank) -> str:
        """How far the terms cancel."""
        return f"terms of {self._grown(self.factors(rank)):.1f} ||W||^2" if self._total > 0 else ""

    def _grown(self, factors: Sequence[Array]) -> float:
        """The sum of ||term||^2, relative to ||W||^2."""
        groups, rank = self.shape.groups, factors[0].shape[1]
        squares = np.ones((groups, rank))
        for i, factor in enumerate(factors):
            last = i == len(factors) - 1
            columns = factor.swapaxes(1, 2) if last else factor
            squares *= np.square(columns).reshape(groups, rank, -1).sum(axis=2)
        return float(squares.sum() / np.vdot(self.weight, self.weight))

    def in_metric(self, gram: Array, rank: Rank) -> CpFit:
        """With the terms there are: fitting them takes far longer than what calibration makes of them."""
        made = CpFit(self.cp, self.weight, gram, rank)
        made._terms = self._terms
        return made

    def _ladder(self, rank: int) -> list[int]:
        return ladder(rank - 1, least_rank(self.shape))

    def _at(self, rank: int) -> list[Terms]:
        """Terms of every group, remembered."""
        if rank not in self._terms:
            lower = self._ladder(rank)
            below = self._at(lower[-1]) if lower else [None] * self.shape.groups
            self._terms[rank] = [self._fitted(*pair, rank) for pair in zip(self._problems, below, strict=True)]
        return self._terms[rank]

    def _fitted(self, problem: Problem, below: Terms | None, rank: int) -> Terms:
        rng = np.random.default_rng(rank)
        if problem.norm == 0:
            return replace(problem.random(rank, rng), weights=np.zeros(rank))
        first = below.widened(rank, rng) if below else problem.spectral(rank, rng)
        starts = [first, *(problem.random(rank, rng) for _ in range(self.cp.restarts))]
        held = problem.als(starts, self.cp.sweeps, ridge=RIDGE)
        freed = problem.als([held], POLISH)  # the ridge has shrunk what fits exactly, too
        terms = freed if problem.degeneracy(freed) <= LIMIT else held
        return problem.corrected(terms, SLACK, CALM) if problem.degeneracy(terms) > LIMIT else terms

    def _stages(self, terms: Sequence[Terms]) -> tuple[Array, ...]:
        """The terms as weights, the length of each shared by all stages."""
        chain = self.method.chain(self.shape, (len(terms[0].weights),))
        share = [np.power(np.abs(t.weights), 1 / len(chain.stages)) for t in terms]
        axes = (1, *range(2, 2 + len(chain.stages) - 2), 0)  # the tensor's axis of each stage
        stacked = [np.stack([t.factors[axis] * s for t, s in zip(terms, share, strict=True)]) for axis in axes]
        turned = [array if i == len(stacked) - 1 else array.swapaxes(1, 2) for i, array in enumerate(stacked)]
        return tuple(array.reshape(stage.weight) for array, stage in zip(turned, chain.stages, strict=True))


class CpBase(Decomposition):
    """What both forms share: subclasses say which spatial axes go together.

    Options are `restarts`, random starts besides the terms of the next lower rank, and `sweeps`, at most.
    """

    depthwise: ClassVar[bool] = True
    by_rank: ClassVar[bool] = True
    restarts: int
    sweeps: int

    def __post_init__(self) -> None:
        """Refuse negative numbers of starts and sweeps."""
        require_counts(restarts=self.restarts, sweeps=self.sweeps)

    @abstractmethod
    def axes(self, shape: LayerShape) -> Sequence[Shape]:
        """Spatial axes of each depthwise stage."""

    def refusal(self, shape: LayerShape) -> str | None:
        """Refuse what has no kernel, or a side with one channel."""
        if shape.is_matrix:
            return f"{shape} has no kernel: svd reaches the same error with fewer stages"
        if min(shape.out, shape.in_) < 2:
            return f"{shape} has one channel on a side: svd reaches the same error with fewer stages"
        return None

    def ranks(self, shape: LayerShape, block: int) -> Sequence[Rank]:
        """Those of `ladder` that are whole blocks, up to half of the layer's weights, a third in wide layers.

        Where none is, any of them; rank one where that leaves none and it has fewer weights than the layer.
        """
        taps = sum(math.prod(shape.kernel[axis] for axis in axes) for axes in self.axes(shape))
        weights, each = shape.out * shape.inputs, shape.in_ + taps + shape.out
        least = min((weights - 1) // each, 1)
        most = min(max(weights // (each * (3 if weights > WIDE else 2)), least), *self.exact_rank(shape))
        whole = [rank for rank in ladder(most, least_rank(shape)) if rank % block == 0]
        return [(rank,) for rank in whole or ladder(most)]

    def chain(self, shape: LayerShape, rank: Rank) -> Chain:
        """A 1x1 convolution, one depthwise stage per part of the kernel, a 1x1 convolution."""
        (count,) = rank
        n, ones = len(shape.kernel), (1,) * len(shape.kernel)
        unit = iter("ABDEFGHIJKLMNOPQRSTUVWXYZ")  # axes of length one
        middle: list[Stage] = []
        letters: list[str] = []
        for axes in self.axes(shape):
            kernel = tuple(k if axis in axes else 1 for axis, k in enumerate(shape.kernel))
            middle.append(Stage(shape.groups * count, 1, 1, kernel, axes))
            taps = "".join("hwd"[axis] if axis in axes else next(unit) for axis in range(n))
            letters.append(f"(gr){next(unit)}{next(unit)}{taps}")
        first, last = ("".join(next(unit) for _ in range(n)) for _ in range(2))
        return Chain(
            method=self.name,
            stages=(
                Stage(shape.groups, count, shape.in_, ones),
                *middle,
                Stage(shape.groups, shape.out, count, ones),
            ),
            equation=f"grc{first},{','.join(letters)},gsr{last}->gsc{'hwd'[:n]}",
        )

    def factorize(self, weight: Array, gram: Array | None = None, *, most: Rank | None = None) -> Factorization:
        """Nothing yet: ranks are fitted when they are asked for."""
        return CpFit(self, weight, gram, most)

    def exact_rank(self, shape: LayerShape) -> Rank:
        """The number of fibres along the longest axis."""
        sizes = [math.prod(shape.kernel[axis] for axis in axes) for axes in self.axes(shape)]
        return (shape.out * shape.inputs // max(shape.out, shape.in_, *sizes),)


def ladder(most: int, least: int = 1) -> list[int]:
    """2^n and 3 2^n within limits: every fit starts from the one below."""
    return sorted({a << n for a in (1, 3) for n in range(most.bit_length()) if least <= a << n <= most})


def least_rank(shape: LayerShape) -> int:
    """Where the ladder of a layer starts: the lowest ranks say nothing of a wide one."""
    return 16 if shape.out * shape.inputs > WIDE else 1


@dataclass(frozen=True)
class Cp(CpBase):
    """CP with the kernel in one depthwise stage: 1x1 C->R, depthwise kxk, 1x1 R->S.

    `largest` are the weights of one group beyond which it refuses: fits by iteration take minutes there.
    """

    restarts: int = 0
    sweeps: int = 60
    largest: int = 5 << 19
    name: ClassVar[str] = "cp"

    def axes(self, shape: LayerShape) -> Sequence[Shape]:
        """All of them together."""
        return [tuple(range(len(shape.kernel)))]

    def refusal(self, shape: LayerShape) -> str | None:
        """Refuse in addition what takes minutes to fit."""
        if (sentence := super().refusal(shape)) is not None:
            return sentence
        if (weights := shape.out * shape.inputs) > self.largest:
            return f"{shape} has {weights} weights: it takes minutes to fit, unless cp{{largest={weights}}} asks for it"
        return None


@dataclass(frozen=True)
class CpSpatial(CpBase):
    """CP with a depthwise stage per spatial axis: 1x1 C->R, depthwise kh x 1, depthwise 1 x kw, 1x1 R->S."""

    on_request: ClassVar[str] = "every rank is fitted by iteration, and cp is as good with one stage fewer"
    restarts: int = 1
    sweeps: int = 60
    name: ClassVar[str] = "cp_spatial"

    def axes(self, shape: LayerShape) -> Sequence[Shape]:
        """One by one, those of length one with the first."""
        wide = [axis for axis, k in enumerate(shape.kernel) if k > 1] or [0]
        narrow = [axis for axis, k in enumerate(shape.kernel) if k == 1 and axis not in wide]
        return [tuple(sorted((wide[0], *narrow))), *((axis,) for axis in wide[1:])]

    def refusal(self, shape: LayerShape) -> str | None:
        """Refuse in addition what has one spatial axis."""
        if (sentence := super().refusal(shape)) is not None:
            return sentence
        if len(self.axes(shape)) < 2:
            return f"{shape} has one spatial axis: cp gives the same chain"
        return None
