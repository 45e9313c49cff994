"""What formats without a closed form share: a fit of its own for every rank asked for, remembered, and the best so far.

They all end in a 1x1 convolution that alone holds the outputs: W = A T, with the features T that the stages before it
compute. Calibrated, the data-free fit gives T, A is the least-squares solution on the second moment G,

    A (T G T^T) = M G T^T,

and one sweep over all stages follows (`multilinear.refine`), which only lowers the error. Where several stages hold the
outputs, or the last one some of the inputs, there is the sweep alone. Some formats go on before that (`mixing`).

Errors never rise with the rank: a rank gets the best fit of those at or below it, padded with zeros. Those are all that
were asked for so far, or the ones the format names (`lower`): what a rank gets depends on nothing else then.
"""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnx_lowrank.chain import Chain
from onnx_lowrank.contraction import contract
from onnx_lowrank.decomposition import Decomposition, Factorization, Rank
from onnx_lowrank.layer import Array, LayerShape
from onnx_lowrank.linalg import NestedFit
from onnx_lowrank.multilinear import refine, working
from onnx_lowrank.passes.decompose.whitened import usable

logger = logging.getLogger(__name__)
_JITTER = {np.dtype(np.float32): 1e-7, np.dtype(np.float64): 1e-12}


@dataclass(frozen=True, eq=False)
class _Fit:
    """Factors of one rank and their exact error; infinite for factors that must not be used."""

    factors: tuple[Array, ...]
    error: float


Made = tuple[tuple[Array, ...], Array]  # factors, and the squared error of each group's outputs


class Fitted(Factorization):
    """Fits of one weight, made when their rank is first asked for.

    Args:
        method: The format.
        weight: (g, S, C, *kernel).
        gram: Second moments (g, n, n) or None, see `Decomposition.factorize`.
        most: The only rank that will be asked for; None: any. Lower ones are fitted to `gram` only if it is not usable.
    """

    def __init__(self, method: Decomposition, weight: Array, gram: Array | None, most: Rank | None = None) -> None:
        groups, out, in_, *kernel = weight.shape
        self.method, self.shape = method, LayerShape(groups, out, in_, tuple(kernel))
        self.weight = weight.astype(np.float64, copy=False)
        self._matrix = self.weight.reshape(groups, out, -1)
        metric = usable(gram)
        self._product = self._matrix if metric is None else self._matrix @ metric
        self._gram = None if metric is None else working(metric)
        self._total = float(np.vdot(self._product, self._matrix))
        self._only = None if metric is None else most
        self._fits: dict[Rank, _Fit] = {}
        self._told: dict[Rank, tuple[float, Rank]] = {}

    @abstractmethod
    def fit(self, rank: Rank) -> tuple[Array, ...]:
        """Data-free factors at one rank, the same whenever they are asked for."""

    @abstractmethod
    def exact(self) -> tuple[Array, ...]:
        """Factors at the exact rank that give the weight back."""

    def lower(self, rank: Rank) -> Sequence[Rank] | None:  # noqa: ARG002 - for formats whose fits build on each other
        """The ranks below that are fitted first, lowest first; None: those that were asked for."""
        return None

    def usable(self, rank: Rank, factors: Sequence[Array]) -> bool:  # noqa: ARG002 - for formats that can degenerate
        """Whether factors may be handed out."""
        return True

    def error(self, rank: Rank) -> float:
        """Relative error in the metric of the fit: of the fit itself, or what a higher rank was told to have."""
        return self._answer(rank)[0]

    def factors(self, rank: Rank) -> tuple[Array, ...]:
        """Weights of the stages: the best fit so far at or below `rank`."""
        at = self._answer(rank)[1]
        return _padded(self.method.chain(self.shape, at), self._fits[at].factors, self.method.chain(self.shape, rank))

    def data_free(self, rank: Rank) -> tuple[Array, ...] | None:
        """What the factors at `rank` were before the second moment was looked at."""
        at = self._answer(rank)[1]
        return _padded(self.method.chain(self.shape, at), self._start(at), self.method.chain(self.shape, rank))

    def _fits_below(self, rank: Rank) -> list[tuple[Rank, _Fit]]:
        """What was fitted at ranks of the same structure that do not exceed `rank` and are looked at, best first."""
        lower = self.lower(rank)
        looked_at = self._fits if lower is None else {rank, *lower}
        found = [(other, fit) for other, fit in self._fits.items() if other in looked_at and self._below(other, rank)]
        return sorted(found, key=lambda entry: entry[1].error)

    def _below(self, rank: Rank, other: Rank) -> bool:
        cut = self.method.structure
        return rank[:cut] == other[:cut] and all(a <= b for a, b in zip(rank, other, strict=True))

    def _answer(self, rank: Rank) -> tuple[float, Rank]:
        if rank not in self._told and rank == self.method.exact_rank(self.shape):
            self._fits[rank] = _Fit(self.exact(), 0.0)
            self._told[rank] = 0.0, rank
        elif rank not in self._told:
            lower = self.lower(rank) or ()
            for each in (rank, *lower) if rank == self._only else (*lower, rank):
                if each not in self._fits:
                    self._fits[each] = self._made(each)
                if each == self._only and self._fits[each].error < math.inf:
                    break
            at, best = self._fits_below(rank)[0]
            above = [error for other, (error, _) in self._told.items() if self._below(rank, other)]
            self._told[rank] = max(best.error, *above, 0.0), at
        return self._told[rank]

    def _start(self, rank: Rank) -> tuple[Array, ...]:
        if rank == self.method.exact_rank(self.shape):
            return self.exact()
        if self._total <= 0:
            return tuple(np.zeros(stage.weight) for stage in self.method.chain(self.shape, rank).stages)
        return self.fit(rank)

    def _made(self, rank: Rank) -> _Fit:
        chain, factors = self.method.chain(self.shape, rank), self._start(rank)
        if self._total <= 0:
            return _Fit(factors, 0.0)
        if self._gram is None:
            error = float(np.linalg.norm(self.weight - chain.dense(factors))) / math.sqrt(self._total)
        else:
            factors, left = self._calibrated(rank, chain, factors, self._gram)
            error = math.sqrt(max(float(left.sum()), 0.0) / self._total)
        lower = self.lower(rank)
        lowest = not (self._fits_below(rank) if lower is None else lower)  # something must be handed out
        if lowest or self.usable(rank, factors):
            return _Fit(factors, error)
        logger.info(
            "%s %s is degenerate at rank %s: a lower one's factors are used", self.method.name, self.shape, rank
        )
        return _Fit(factors, math.inf)

    def _calibrated(self, rank: Rank, chain: Chain, factors: tuple[Array, ...], gram: Array) -> Made:
        """Factors for the outputs, from data-free ones."""
        return self._refined(rank, chain, self._solved(chain, factors, gram), gram)

    def _solved(self, chain: Chain, factors: tuple[Array, ...], gram: Array) -> tuple[Array, ...]:
        """The factors with the last one solved for.

        As they are where the last one does not alone hold the outputs and none of the inputs.
        """
        group, out, *kept = chain.axes
        subscripts, result = chain.letters
        alone = len(out) == 1 and out in subscripts[-1] and not any(out in letters for letters in subscripts[:-1])
        if not alone or set("".join(kept)) & set(subscripts[-1]):
            return factors
        features = subscripts[-1].replace(group, "").replace(out, "")
        terms = list(zip(subscripts[:-1], chain.apart(factors)[:-1], strict=True))
        rows = contract(terms, group + features + result[2:], chain.sizes).reshape(len(gram), -1, gram.shape[1])
        triples = zip(rows.astype(gram.dtype, copy=False) @ gram, rows, self._product, strict=True)
        jitter = _JITTER[gram.dtype]
        fits = [NestedFit(half @ row.T, row @ product.T, jitter) for half, row, product in triples]
        last = [fit.solve(rows.shape[1]).T for fit in fits]
        return _balanced((*factors[:-1], np.stack(last).reshape(chain.stages[-1].weight)))

    def _refined(self, rank: Rank, chain: Chain, factors: tuple[Array, ...], gram: Array) -> Made:
        """The factors after one sweep, or as they were where they must not be used then."""
        refined = refine(chain, factors, self.weight, gram, sweeps=1)
        best = refined if self.usable(rank, refined) else factors
        difference = (chain.dense(best) - self.weight).reshape(self._matrix.shape).astype(gram.dtype, copy=False)
        return best, np.asarray(np.sum((difference @ gram) * difference, axis=(1, 2), dtype=np.float64))


def _balanced(factors: Sequence[Array]) -> tuple[Array, ...]:
    """The same product from factors of one norm, which stay in range in half precision."""
    norms = [float(np.linalg.norm(factor)) for factor in factors]
    if min(norms) <= 0:
        return tuple(factors)
    common = math.exp(sum(map(math.log, norms)) / len(norms))
    return tuple(factor * (common / norm) for factor, norm in zip(factors, norms, strict=True))


def _padded(chain: Chain, factors: Sequence[Array], wider: Chain) -> tuple[Array, ...]:
    """Factors of a chain as those of a wider chain of the same format; what is new is zero."""
    if chain == wider:
        return tuple(factors)
    return tuple(
        np.pad(array, [(0, wider.sizes[x] - chain.sizes[x]) for x in letters]).reshape(stage.weight)
        for array, letters, stage in zip(chain.apart(factors), chain.letters[0], wider.stages, strict=True)
    )
