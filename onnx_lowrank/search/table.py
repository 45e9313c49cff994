"""The candidate table: every layer decomposed by every method, thinned, and priced by measured latency."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from joblib import Parallel, cpu_count, delayed
from threadpoolctl import threadpool_limits

from onnx_lowrank.candidates import Candidate, Grid, candidate, keep, worth_timing
from onnx_lowrank.decomposition import Decomposition, Rank
from onnx_lowrank.latency.chains import Job, Pricer
from onnx_lowrank.layer import Array, Layer
from onnx_lowrank.search.factorizations import FactorizationCache

Progress = Callable[[int, int], None]
GridOf = Callable[[Layer], Grid]
UNWANTED = -1.0
MOST_WORKERS = 4  # each holds a weight and its bases


@dataclass(frozen=True, eq=False)
class Row:
    """One layer of the table.

    Args:
        layer: The layer.
        options: Its candidates, "keep" first.
        refusals: Method -> the sentence why it has no candidates.
    """

    layer: Layer
    options: tuple[Candidate, ...]
    refusals: Mapping[str, str]

    @property
    def keep(self) -> Candidate:
        """The candidate that leaves the layer alone."""
        return self.options[0]

    @property
    def factorable(self) -> bool:
        """Whether some method accepts the layer."""
        return len(self.options) > 1


def tabulate(
    layers: Sequence[Layer],
    methods: Sequence[Decomposition],
    grid_of: GridOf,
    cache: FactorizationCache,
    progress: Progress,
    *,
    exact_only: bool = False,
) -> list[Row]:
    """Decompose every layer by every method and keep the candidates worth timing.

    Args:
        layers: The layers.
        methods: Allowed decompositions.
        grid_of: The ranks worth a look of every layer.
        cache: Receives the factorizations.
        progress: Told how many layers are done.
        exact_only: Only the ranks that reproduce the weight, for a check of the rewriting itself.
    """
    work = (delayed(row_of)(layer, methods, grid_of(layer), cache, exact_only=exact_only) for layer in layers)
    rows: list[Row] = []
    workers = Parallel(n_jobs=min(MOST_WORKERS, cpu_count()), backend="threading", return_as="generator")
    # One BLAS thread per layer: eigh hardly gains from a second one, and on a busy machine its threads, waiting for
    # each other, take ten times as long.
    with threadpool_limits(1):
        done: Iterable[Row] = workers(work)  # pyright: ignore[reportAssignmentType] - joblib's stub: list of Any or None
        for row in done:
            rows.append(row)
            progress(len(rows), len(layers))
    return rows


def row_of(
    layer: Layer,
    methods: Sequence[Decomposition],
    grid: Grid,
    cache: FactorizationCache,
    *,
    exact_only: bool = False,
    gram: Array | None = None,
) -> Row:
    """One layer decomposed by every method.

    Args:
        layer: The layer.
        methods: Allowed decompositions.
        grid: The ranks worth a look.
        cache: Receives the factorizations.
        exact_only: As for `tabulate`.
        gram: Second moment of the layer's unfolded input, see `Decomposition.factorize`.
    """
    refusals = {m.name: sentence for m in methods if (sentence := m.refusal(layer.shape)) is not None}
    accepted = [m for m in methods if m.name not in refusals]
    if not accepted:
        return Row(layer, (keep(layer),), refusals)
    weight = layer.read()
    ranks: dict[str, Sequence[Rank]] = {}
    for method in accepted:
        exact = method.exact_rank(layer.shape)
        step = grid.depthwise_step if method.depthwise else grid.step
        ranks[method.name] = ([exact] if exact else []) if exact_only else method.ranks(layer.shape, step)
        if not ranks[method.name]:
            refusals[method.name] = f"no rank of {layer.shape} has fewer weights than the layer"
    options: list[Candidate] = []
    for method in (m for m in accepted if m.name not in refusals):
        made = cache.make(layer, method, weight, gram)
        options.extend(candidate(layer, method, made, rank, grid.block) for rank in ranks[method.name])
    chosen = options if exact_only else worth_timing(options, grid.per_method)
    return Row(layer, (keep(layer), *chosen), refusals)


def price(
    rows: Sequence[Row], timer: Pricer, progress: Progress, wanted: Callable[[Candidate], bool] = lambda _: True
) -> list[Row]:
    """Time the wanted candidates of every row and all layers.

    What cannot be timed is dropped (`timer.dropped`); what is not wanted, or not by time, stays without a latency.
    """
    timed = [(row.layer, o) for row in rows if row.factorable for o in row.options if o.chain is None or wanted(o)]
    prices = timer.price([Job(layer, option.chain) for layer, option in timed], progress)
    ms = {(o.key, o.method, o.rank): price for (_, o), price in zip(timed, prices, strict=True)}
    priced: list[Row] = []
    for row in rows:
        if not row.factorable:
            priced.append(row)
            continue
        found = [(option, ms.get((option.key, option.method, option.rank), UNWANTED)) for option in row.options]
        options = [o if t == UNWANTED else o.timed(t) for o, t in found if t is not None]
        kept = tuple(options) if options and options[0].chain is None else (row.keep,)
        priced.append(replace(row, options=kept))
    return priced
