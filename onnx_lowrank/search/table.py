"""The candidate table: every layer decomposed by every method, thinned, and priced by measured latency."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from joblib import Parallel, cpu_count, delayed
from threadpoolctl import threadpool_limits

from onnx_lowrank.candidates import Candidate, Grid, candidate, keep, worth_timing
from onnx_lowrank.decomposition import Decomposition, Factorization, Rank
from onnx_lowrank.latency.chains import Pricer
from onnx_lowrank.latency.pieces import Job
from onnx_lowrank.layer import Array, Layer, LayerShape
from onnx_lowrank.linalg import output_norm
from onnx_lowrank.passes.decompose.whitened import usable
from onnx_lowrank.row_space import SeenInputs
from onnx_lowrank.search.factorizations import FactorizationCache

Progress = Callable[[int, int], None]
GridOf = Callable[[Layer], Grid]
UNWANTED = -1.0
UNTIMED = "its own latency could not be measured"
MOST_WORKERS = 4  # each holds a weight and its bases
MOST_JUDGED = 24  # ranks of a format whose dense weights are made to see what outputs lose


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
    spectral: bool = False,
) -> list[Row]:
    """Decompose every layer by every method and keep the candidates worth timing.

    Args:
        layers: The layers.
        methods: Allowed decompositions.
        grid_of: The ranks worth a look of every layer.
        cache: Receives the factorizations.
        progress: Told how many layers are done.
        exact_only: Only the ranks that reproduce the weight, for a check of the rewriting itself.
        spectral: Tell the spectral errors of what is kept, too.
    """
    asked = {"exact_only": exact_only, "spectral": spectral}
    work = (delayed(row_of)(layer, methods, grid_of(layer), cache, **asked) for layer in layers)
    rows: list[Row] = []
    workers = Parallel(n_jobs=most_workers(), backend="threading", return_as="generator")
    with one_blas_thread():
        done: Iterable[Row] = workers(work)  # pyright: ignore[reportAssignmentType] - joblib's stub: list of Any or None
        for row in done:
            rows.append(row)
            progress(len(rows), len(layers))
    return rows


def most_workers() -> int:
    """Decompositions made at once."""
    return min(MOST_WORKERS, cpu_count())


def one_blas_thread() -> threadpool_limits:
    """While several decompositions are made at once.

    eigh hardly gains from a second thread, and on a busy machine the threads, waiting for each other, take ten times as
    long; small products and triangular solves take twice as long on two hyperthreads of one core.
    """
    return threadpool_limits(1)


def row_of(
    layer: Layer,
    methods: Sequence[Decomposition],
    grid: Grid,
    cache: FactorizationCache,
    *,
    exact_only: bool = False,
    spectral: bool = False,
    gram: Array | None = None,
    seen: SeenInputs | None = None,
    workers: int = 1,
) -> Row:
    """One layer decomposed by every method.

    Args:
        layer: The layer.
        methods: Allowed decompositions.
        grid: The ranks worth a look.
        cache: Receives the factorizations.
        exact_only: As for `tabulate`.
        spectral: As for `tabulate`.
        gram: Second moment of the layer's unfolded input, or in the row space of its weight, see `row_space`.
        seen: Judges the formats that such a moment says too little of; without it, or where a rule compares spectral
            errors, these are refused.
        workers: Methods that are tried at once.
    """
    narrow = gram is not None and gram.shape[-1] != layer.shape.inputs
    free = {m.name for m in methods if narrow and not m.whole_rows}
    judge = None if spectral else seen
    refusals = {m.name: sentence for m in methods if (sentence := m.refusal(layer.shape)) is not None}
    if judge is None:
        refusals |= dict.fromkeys(free, f"{_too_many(layer.shape)}, and only svd does with fewer")
    accepted = [m for m in methods if m.name not in refusals]
    if not accepted:
        return Row(layer, (keep(layer),), refusals)
    weight = layer.read()
    ranks: dict[str, Sequence[Rank]] = {}
    for method in accepted:
        exact = method.exact_rank(layer.shape)
        ranks[method.name] = ([exact] if exact else []) if exact_only else grid.ranks(method, layer.shape)
        if not ranks[method.name]:
            refusals[method.name] = f"no rank of {layer.shape} has fewer weights than the layer"

    def tried(method: Decomposition) -> list[Candidate]:
        found = ranks[method.name]
        asked = grid.fitted(layer, method, found, weight) if method.by_rank and not exact_only else found
        made = cache.make(layer, method, weight, None if method.name in free else gram, asked)
        options = [candidate(layer, method, made, rank, grid.block) for rank in asked]
        if judge is None or method.name not in free:
            return options
        few = worth_timing(grid.worth_timing(options), MOST_JUDGED)
        return _judged(few, made, layer.shape, judge)

    work = (delayed(tried)(method) for method in accepted if method.name not in refusals)
    found: list[list[Candidate]] = Parallel(n_jobs=workers, backend="threading")(work)  # pyright: ignore[reportAssignmentType] - joblib's stub: list of Any or None
    options = [option for each in found for option in each]
    chosen = options if exact_only else grid.worth_timing(options)
    if spectral:
        named = {option.method for option in chosen}
        made = {m.name: cache.make(layer, m, weight, gram) for m in accepted if m.name in named}
        chosen = with_spectral_errors(chosen, made, weight, gram)
    return Row(layer, (keep(layer), *chosen), refusals)


def with_spectral_errors(
    options: Sequence[Candidate], made: Mapping[str, Factorization], weight: Array, gram: Array | None = None
) -> list[Candidate]:
    """One layer's candidates with the spectral norm of what each of them cuts, relative to the layer's.

    Args:
        options: Of decompositions.
        made: Method -> the weight's factorization.
        weight: (g, S, C, *kernel).
        gram: What it was factorized with.
    """
    moment = usable(gram)
    known = [made[option.method].spectral_error(option.rank) for option in options]
    largest = output_norm(weight, moment) if None in known else 1.0

    def measured(option: Candidate) -> float:
        if option.chain is None or largest <= 0:
            return 0.0
        return output_norm(weight - option.chain.dense(made[option.method].factors(option.rank)), moment) / largest

    errors = [measured(option) if error is None else error for option, error in zip(options, known, strict=True)]
    return [replace(option, spectral_error=error) for option, error in zip(options, errors, strict=True)]


def _judged(options: Sequence[Candidate], made: Factorization, shape: LayerShape, seen: SeenInputs) -> list[Candidate]:
    """Data-free candidates of one method with the errors of outputs."""
    told = f"fitted to the weight alone: {_too_many(shape)}"
    dense = ((option, option.chain, made.factors(option.rank)) for option in options)
    return [
        replace(option, error=seen.error(chain.dense(factors)), note=f"{option.note}, {told}" if option.note else told)
        for option, chain, factors in dense
        if chain is not None
    ]


def _too_many(shape: LayerShape) -> str:
    return f"{shape} has {shape.inputs} inputs: their moments do not fit into memory"


def price(
    rows: Sequence[Row], timer: Pricer, progress: Progress, wanted: Callable[[Candidate], bool] = lambda _: True
) -> list[Row]:
    """Time the wanted candidates of every row and all layers.

    What cannot be timed is dropped (`timer.dropped`), all formats of a layer where the layer itself cannot; what is not
    wanted, or not by time, stays without a latency.
    """
    timed = [(row.layer, o) for row in rows if row.factorable for o in row.options if o.chain is None or wanted(o)]
    prices = timer.price([Job(layer, option.chain) for layer, option in timed], progress)
    ms = {o.name: price for (_, o), price in zip(timed, prices, strict=True)}
    priced: list[Row] = []
    for row in rows:
        if not row.factorable:
            priced.append(row)
            continue
        found = [(option, ms.get(option.name, UNWANTED)) for option in row.options]
        options = [o if t == UNWANTED else o.timed(t) for o, t in found if t is not None]
        if options and options[0].chain is None:
            priced.append(replace(row, options=tuple(options)))
        else:
            untold = {option.method: UNTIMED for option in row.options[1:]}
            priced.append(replace(row, options=(row.keep,), refusals={**row.refusals, **untold}))
    return priced
