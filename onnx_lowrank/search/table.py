"""The candidate table: every layer decomposed by every method, thinned, and priced by measured latency."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from joblib import Parallel, cpu_count, delayed
from threadpoolctl import threadpool_limits

from onnx_lowrank.candidates import Candidate, candidate, keep, worth_timing
from onnx_lowrank.decomposition import Decomposition
from onnx_lowrank.latency.chains import ChainTimer, Job
from onnx_lowrank.layer import Layer
from onnx_lowrank.search.factorizations import FactorizationCache

Progress = Callable[[int, int], None]
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
    blocks: Mapping[str, int],
    cache: FactorizationCache,
    progress: Progress,
    *,
    exact_only: bool = False,
) -> list[Row]:
    """Decompose every layer by every method and keep the candidates worth timing.

    Args:
        layers: The layers.
        methods: Allowed decompositions.
        blocks: Channel block of this machine by operator kind, "conv" and "matmul".
        cache: Receives the factorizations.
        progress: Told how many layers are done.
        exact_only: Only the ranks that reproduce the weight, for a check of the rewriting itself.
    """
    kinds = [blocks["conv" if layer.form.op == "Conv" else "matmul"] for layer in layers]
    work = (delayed(_row)(layer, methods, kind, cache, exact_only) for layer, kind in zip(layers, kinds, strict=True))
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


def _row(
    layer: Layer,
    methods: Sequence[Decomposition],
    block: int,
    cache: FactorizationCache,
    exact_only: bool,  # noqa: FBT001
) -> Row:
    refusals = {m.name: sentence for m in methods if (sentence := m.refusal(layer.shape)) is not None}
    accepted = [m for m in methods if m.name not in refusals]
    if not accepted:
        return Row(layer, (keep(layer),), refusals)
    weight = layer.read()
    options: list[Candidate] = []
    for method in accepted:
        exact = method.exact_rank(layer.shape)
        ranks = ([exact] if exact else []) if exact_only else method.ranks(layer.shape, block)
        if not ranks:
            refusals[method.name] = f"no rank of {layer.shape} has fewer weights than the layer"
            continue
        made = cache.make(layer, method, weight)
        options.extend(candidate(layer, method, made, rank, block) for rank in ranks)
    chosen = options if exact_only else worth_timing(options)
    return Row(layer, (keep(layer), *chosen), refusals)


def price(rows: Sequence[Row], timer: ChainTimer, progress: Progress) -> list[Row]:
    """Time every candidate of every row; those that cannot be timed are dropped (see `timer.dropped`)."""
    jobs = [Job(row.layer, option.chain) for row in rows for option in row.options if row.factorable]
    prices = iter(timer.price(jobs, progress))
    priced: list[Row] = []
    for row in rows:
        if not row.factorable:
            priced.append(row)
            continue
        timed = [(option, next(prices)) for option in row.options]
        options = tuple(option.timed(ms) for option, ms in timed if ms is not None)
        kept = options if options and options[0].chain is None else (row.keep,)
        priced.append(Row(row.layer, kept, row.refusals))
    return priced
