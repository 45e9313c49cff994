"""The protocol of every decomposition: pure mathematics from a canonical weight to the factors of a chain."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import ClassVar

from onnx_lowrank.chain import Chain
from onnx_lowrank.layer import Array, LayerShape, Shape

Rank = tuple[int, ...]


class Factorization(ABC):
    """A weight decomposed once: errors and factors of every rank are then cheap.

    Errors are in the metric the weight was decomposed in: Frobenius, or the output error if it was calibrated.
    """

    @abstractmethod
    def error(self, rank: Rank) -> float:
        """Relative error at `rank`, never below that of `factors(rank)`; exact for spectral methods.

        ||W - W'|| / ||W||, or sqrt(tr((M - M') G (M - M')^T) / tr(M G M^T)) with the input's second moment G.
        """

    @abstractmethod
    def factors(self, rank: Rank) -> tuple[Array, ...]:
        """Weights of the chain's stages at `rank`, first stage first, each of shape `stage.weight`."""

    def spectral_error(self, rank: Rank) -> float | None:  # noqa: ARG002 - for formats whose spectra tell it
        """What rules that look at spectral norms compare, where the format has it at hand or defines its own.

        None: it is measured, ||M - M'||_2 / ||M||_2 of the output unfoldings S x (C prod kernel), or of their products
        with G^(1/2). Unlike `error` it may rise a little with the rank.
        """
        return None

    def note(self, rank: Rank) -> str:  # noqa: ARG002 - for formats whose fits can degenerate
        """What a reader of the report should know of the factors at `rank` beside their error, in a few words."""
        return ""

    def data_free(self, rank: Rank) -> tuple[Array, ...] | None:  # noqa: ARG002 - for formats that are fitted
        """Factors in the Frobenius metric that a calibrated fit started from; None where it started from none."""
        return None

    def in_metric(self, gram: Array, rank: Rank) -> Factorization | None:  # noqa: ARG002 - for formats that are fitted
        """The same weight in another metric, at one rank, from what is known in any; None where that saves nothing.

        It is the one that `Decomposition.factorize` would make.
        """
        return None


class Decomposition(ABC):
    """A low-rank format. Subclasses are frozen dataclasses; their fields are their only options.

    A new file in passes/decompose with such a subclass is found, listed, priced and tested without registration.

    Attributes:
        name: As in the literature.
        on_request: Why the format is tried only where the user names it; empty: it is tried by default.
        depthwise: Whether there are depthwise stages between the ranks' channels. Kernels take these fast in whole
            channel blocks only, so `ranks` is given the machine's block even where time does not count.
        by_rank: Whether every rank is a fit of its own, made when it is first asked for: asking has a price then. Third
            parties' are all taken for such, see `third_party`.
        whole_rows: Whether the first stage reads all inputs at once, kernel included: then the chain can be calibrated
            in the row space of its weight, see `row_space`.
        structure: How many leading entries of a rank say how the weight is arranged, not how much of it is kept;
            negative: all entries but so many. Errors fall with the rank among ranks that agree in them.
    """

    name: ClassVar[str]
    on_request: ClassVar[str] = ""
    depthwise: ClassVar[bool] = False
    by_rank: ClassVar[bool] = False
    whole_rows: ClassVar[bool] = False
    structure: ClassVar[int] = 0

    @property
    def options(self) -> dict[str, object]:
        """Fields of its dataclass by name."""
        return asdict(self)  # pyright: ignore[reportArgumentType] - decompositions are dataclasses

    @abstractmethod
    def refusal(self, shape: LayerShape) -> str | None:
        """The sentence a user reads when the layer cannot be put into this format, or None."""

    @abstractmethod
    def ranks(self, shape: LayerShape, block: int) -> Sequence[Rank]:
        """Ranks worth pricing: fewer weights than the dense layer, multiples of `block` where that is possible."""

    @abstractmethod
    def chain(self, shape: LayerShape, rank: Rank) -> Chain:
        """The chain at `rank`; shapes only."""

    @abstractmethod
    def factorize(self, weight: Array, gram: Array | None = None, *, most: Rank | None = None) -> Factorization:
        """Decompose a canonical weight (groups, out, in, *kernel) once, for every rank.

        Args:
            weight: The weight.
            gram: Second moment E[c c^T] of the layer's unfolded input, (groups, n, n) with n = in * prod(kernel) in the
                weight's own order; positive semidefinite. With it the output error is minimised instead of the
                weight's. A third party's method may ignore it, see `third_party`.
            most: No rank above this one, entry by entry, will be asked for; None: any may be. A method may ignore it.
        """

    @abstractmethod
    def exact_rank(self, shape: LayerShape) -> Rank | None:
        """The rank at which any weight of this shape is reproduced, or None if the format cannot."""

    def promising(self, weight: Array, shares: Mapping[Rank, float]) -> Sequence[Rank]:  # noqa: ARG002 - for formats with more ranks than can be fitted
        """Of a format that fits every rank by itself, the ranks that may be the best for a weight at some budget.

        Here all of them: telling takes their errors.

        Args:
            weight: Canonical, (groups, out, in, *kernel).
            shares: What every rank worth pricing takes of what the layer takes: of its weights, or of its work.
        """
        return list(shares)

    def misfit(self, shape: LayerShape, rank: Rank) -> str | None:
        """Which ranks the layer can have, where `rank` is none of them, else None: here, up to the exact rank."""
        limit = self.exact_rank(shape)
        if limit is None or (len(rank) == len(limit) and all(1 <= r <= m for r, m in zip(rank, limit, strict=True))):
            return None
        return f"1 to {'x'.join(map(str, limit))}"


def require_counts(**options: int) -> None:
    """Options that count something are not negative.

    Raises:
        ValueError: if one is.
    """
    for name, value in options.items():
        if value < 0:
            raise ValueError(f"{name}={value}; expected 0 or more")


def split_axis(kernel: Shape) -> int:
    """The spatial axis that is split from the others: the first one longer than one; 0 where none is."""
    return next((axis for axis, k in enumerate(kernel) if k > 1), 0)


def halves(kernel: Shape) -> tuple[Shape, Shape]:
    """The kernel of the axis that is split off, and that of the others."""
    one = split_axis(kernel)
    first = tuple(k if axis == one else 1 for axis, k in enumerate(kernel))
    return first, tuple(1 if axis == one else k for axis, k in enumerate(kernel))


def spaced(limit: int, block: int) -> list[int]:
    """Few of the `aligned` ranks, each 1.3 times the one before or more: where every rank is fitted by itself."""
    kept: list[int] = []
    for rank in aligned(limit, block):
        if not kept or rank >= 1.3 * kept[-1]:
            kept.append(rank)
    return kept


def aligned(limit: int, block: int) -> list[int]:
    """Ranks 1..limit worth trying on a machine with channel blocks of `block`.

    Multiples of the block and, below the first block, its halves: a rank between two multiples costs as much as the
    upper one, so it is never better.
    """
    small: list[int] = []
    part = block // 2
    while part >= 1:
        small.append(part)
        part //= 2
    return [rank for rank in (*reversed(small), *range(block, limit + 1, block)) if rank <= limit]
