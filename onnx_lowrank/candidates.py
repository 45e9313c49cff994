"""What each layer could become: layer x decomposition x rank, "keep" included, and the problem an allocator solves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from onnx_lowrank.chain import Chain
from onnx_lowrank.decomposition import Decomposition, Factorization, Rank
from onnx_lowrank.layer import Array, Layer, LayerShape, Shape
from onnx_lowrank.plan import KEEP
from onnx_lowrank.spectra import Unfolding

Cost = Literal["ms", "macs", "params"]
Name = tuple[str, str, Rank]
# Kernels differ in efficiency: a format with up to this many times the padded MACs of another may still be the faster.
# On eight models 1.1 changed no choice of any goal; the rest is left to machines with other kernels.
FORMAT_SLACK = 1.2
SMALLEST_SHARE = 1e-9
ROUNDING = 1e-9  # of a budget: a sum of the same costs in another order is no excess
# A layer of this many channel blocks or more has ranks enough among their multiples.
WIDE = 16


@dataclass(frozen=True)
class Candidate:
    """One thing a layer could become.

    Args:
        key: The layer's key.
        method: Decomposition name or "keep".
        rank: Empty for "keep".
        chain: None for "keep".
        error: Relative error of the weight; of the layer's outputs where moments were taken.
        spectral_error: Relative spectral norm of what is cut, see `Factorization.spectral_error`; None unless the rule
            compares it.
        params: Weights, per model.
        macs: Multiply-accumulates per run.
        padded_macs: The same with channel counts rounded up to the machine's block.
        ms: Milliseconds per run with what `micro_model` puts behind; None until timed.
        exact: Whether the rank reproduces any weight.
        probed_loss: Loss of the network's outputs, interpolated from probes; None without data.
        note: What the factorization has to say of itself.
    """

    key: str
    method: str
    rank: Rank
    chain: Chain | None
    error: float
    spectral_error: float | None
    params: int
    macs: float
    padded_macs: float
    ms: float | None = None
    exact: bool = False
    probed_loss: float | None = None
    note: str = ""

    @property
    def name(self) -> Name:
        """What tells it from all others of a table."""
        return self.key, self.method, self.rank

    @property
    def loss(self) -> float:
        """Predicted damage, additive over layers: what was probed (see `sensitivity`), else -log(1 - error^2).

        1 - error^2 is the share of the layer's energy that is kept; what passes through the network is taken to be the
        product of the shares (Zhang et al., TPAMI 2016, on PCA energies). Unlike error^2 alone it has no ceiling: a
        layer is never given up to save the others.
        """
        if self.probed_loss is not None:
            return self.probed_loss
        return -math.log(max(1.0 - self.error**2, SMALLEST_SHARE))

    def cost(self, of: Cost) -> float:
        """What the candidate takes from the budget.

        Raises:
            ValueError: if milliseconds are asked of a candidate that was not timed.
        """
        if of == "ms":
            if self.ms is None:
                raise ValueError(f"{self.key}: {self.method} {self.rank} was not timed")
            return self.ms
        return float(self.params) if of == "params" else self.macs

    def timed(self, ms: float) -> Candidate:
        """The same candidate with its measured latency."""
        return replace(self, ms=ms)


@dataclass(frozen=True, eq=False)
class Evidence:
    """What some rules need beside the candidates' own numbers; a rule says which part it cannot do without.

    Args:
        energy: Layer key -> ||W||^2 in the metric of its candidates' errors: error^2 of it is what a candidate cuts.
        unfolding: (layer key, spatial axes of the earlier stages) -> the spectrum of that unfolding of the weight.
        measure: A choice -> the loss of the network's outputs under it, measured; None where there are no samples.
        evaluations: How often a rule may measure.
        seed: Of everything random.
        deadline: `time.monotonic()` at which measuring should end.
    """

    energy: Callable[[str], float] | None = None
    unfolding: Callable[[str, Shape], Unfolding] | None = None
    measure: Callable[[Sequence[Candidate]], float] | None = None
    evaluations: int = 100
    seed: int = 0
    deadline: float = math.inf


@dataclass(frozen=True)
class Problem:
    """What an allocator sees: for every layer its candidates ("keep" first), and the budget.

    Args:
        layers: Candidates per layer.
        cost: What is limited.
        budget: Limit of the sum of costs over all layers.
        evidence: For the rules that need more than that.
    """

    layers: tuple[tuple[Candidate, ...], ...]
    cost: Cost
    budget: float
    evidence: Evidence = field(default=Evidence(), compare=False)

    def total(self, chosen: Sequence[Candidate]) -> float:
        """Cost of one choice per layer."""
        return sum(candidate.cost(self.cost) for candidate in chosen)

    def fits(self, chosen: Sequence[Candidate]) -> bool:
        """Whether one choice per layer stays within the budget."""
        return self.total(chosen) <= self.budget + ROUNDING * abs(self.budget)

    def cheapest(self) -> tuple[Candidate, ...]:
        """The choice of least cost, the best that can be had when the budget cannot be met."""
        return tuple(min(options, key=lambda c: (c.cost(self.cost), c.loss)) for options in self.layers)


def loss_of(chosen: Sequence[Candidate]) -> float:
    """Predicted damage of a choice."""
    return sum(candidate.loss for candidate in chosen)


def keep(layer: Layer) -> Candidate:
    """The candidate that leaves the layer alone."""
    return Candidate(layer.key, KEEP, (), None, 0.0, 0.0, layer.shape.params, layer.macs, layer.macs)


@dataclass(frozen=True)
class Grid:
    """Which ranks are worth a look.

    Args:
        step: Ranks are multiples of it.
        depthwise_step: Likewise, of formats with depthwise stages: the machine's block. At other channel counts such a
            stage takes several times as long (32->32 at 28x28, rank 26: 139 us, rank 32: 64, the dense layer: 176).
        block: Channel counts are rounded up to multiples of it, as kernels with blocked layouts do; 1 where time does
            not count.
        per_method: Candidates kept of each method.
        cost: What the ranks are to be few for; "ms" is told by multiply-accumulates.
    """

    step: int
    depthwise_step: int
    block: int = 1
    per_method: int = 12
    cost: Cost = "ms"

    def ranks(self, method: Decomposition, shape: LayerShape) -> Sequence[Rank]:
        """The ranks of a method that are looked at."""
        return method.ranks(shape, self.depthwise_step if method.depthwise else self.step)

    def fitted(self, layer: Layer, method: Decomposition, ranks: Sequence[Rank], weight: Array) -> Sequence[Rank]:
        """Which of them are, where every rank is a fit of its own."""
        return method.promising(weight, shares(layer, method, ranks, self.cost))

    def worth_timing(self, options: Sequence[Candidate]) -> list[Candidate]:
        """The candidates that may be the best choice at some budget."""
        return worth_timing(options, self.per_method, weights if self.cost == "params" else padded_macs)

    @staticmethod
    def of_machine(block: int) -> Grid:
        """Ranks that fill the machine's channel blocks: one in between costs as much as the next multiple."""
        return Grid(block, block, block)

    @staticmethod
    def of_size(shape: LayerShape, block: int, cost: Cost = "macs") -> Grid:
        """Ranks for goals of size, where every one counts for itself.

        Wide layers have multiples of the block enough, and lose no time by them; of narrow ones about 32 ranks.
        """
        side = min(shape.out, shape.in_)
        return Grid(block if side >= WIDE * block else max(1, side // 32), block, 1, 32, cost)


def candidate(layer: Layer, method: Decomposition, factorization: Factorization, rank: Rank, block: int) -> Candidate:
    """The candidate of one method at one rank."""
    chain = method.chain(layer.shape, rank)
    return Candidate(
        key=layer.key,
        method=method.name,
        rank=rank,
        chain=chain,
        error=factorization.error(rank),
        spectral_error=None,
        params=chain.params,
        macs=chain.macs(layer),
        padded_macs=chain.macs(layer, block),
        exact=rank == method.exact_rank(layer.shape),
        note=factorization.note(rank),
    )


def padded_macs(option: Candidate) -> float:
    """What stands in for latency where nothing was timed."""
    return option.padded_macs


def weights(option: Candidate) -> float:
    """What goals of weights limit."""
    return float(option.params)


def shares(layer: Layer, method: Decomposition, ranks: Sequence[Rank], cost: Cost) -> dict[Rank, float]:
    """What every rank takes of what the layer does: weights, or multiply-accumulates."""
    chains = {rank: method.chain(layer.shape, rank) for rank in ranks}
    if cost == "params":
        return {rank: chain.params / layer.shape.params for rank, chain in chains.items()}
    return {rank: chain.macs(layer) / layer.macs for rank, chain in chains.items()}


def front(options: Sequence[Candidate], cost: Callable[[Candidate], float] = padded_macs) -> list[Candidate]:
    """Candidates that no other beats on both error and cost, cheapest first."""
    best: list[Candidate] = []
    for option in sorted(options, key=lambda c: (cost(c), c.error, c.method, c.rank)):
        if not best or option.error < best[-1].error:
            best.append(option)
    return best


def worth_timing(
    options: Sequence[Candidate], per_method: int = 12, cost: Callable[[Candidate], float] = padded_macs
) -> list[Candidate]:
    """Thin the candidates of one layer to those that may be the best choice at some budget.

    Per method: its front of (error, cost), thinned to `per_method` ranks evenly spaced in the logarithm of the cost.
    Across methods: dropped where another has no more error at less than 1 / `FORMAT_SLACK` of the cost.
    """
    overall = front(options, cost)
    kept: list[Candidate] = []
    for method in dict.fromkeys(option.method for option in options):
        mine = front([option for option in options if option.method == method], cost)
        rivals = [c for c in mine if not any(_beaten(c, other, cost) for other in overall)]
        kept.extend(_spread(rivals, per_method, cost))
    return kept


def _beaten(option: Candidate, other: Candidate, cost: Callable[[Candidate], float]) -> bool:
    return other.error <= option.error and cost(other) * FORMAT_SLACK < cost(option)


def _spread(options: Sequence[Candidate], count: int, cost: Callable[[Candidate], float]) -> list[Candidate]:
    """At most `count` of the options, cheapest first, evenly spaced in the logarithm of the cost; ends included."""
    if len(options) <= count:
        return list(options)
    low, high = cost(options[0]), cost(options[-1])
    marks = [low * (high / low) ** (i / (count - 1)) for i in range(count)]
    picked = {min(range(len(options)), key=lambda i: abs(cost(options[i]) - mark)) for mark in marks}
    return [options[i] for i in sorted(picked)]
