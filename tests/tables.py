"""Candidate tables that rank rules are tested on: small numbers to enumerate, and those of small weights."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache

import numpy as np
from hypothesis import strategies as st

from onnx_lowrank.candidates import Candidate, Cost, Evidence, Problem, candidate, keep
from onnx_lowrank.chain import Chain, Stage
from onnx_lowrank.layer import Array, Form, Geometry, Layer, LayerShape, Site
from onnx_lowrank.passes.decompose import decompositions
from onnx_lowrank.search.table import with_spectral_errors
from onnx_lowrank.spectra import Unfolding

Choice = tuple[Candidate, ...]
# Those of blocks too, and none that fits every rank by itself for seconds.
TABLED = {"svd", "svd_input", "spatial_svd", "spatial_svd_reversed", "tucker2", "grouped_svd", "kronecker"}


def option(layer: int, cost: float, error: float, spectral: float | None = None, *, exact: bool = False) -> Candidate:
    method = "keep" if error == 0 and not exact else "svd"
    return Candidate(
        f"l{layer}", method, (), None, error, error if spectral is None else spectral, 0, cost, cost, cost, exact=exact
    )


@st.composite
def problems(draw: st.DrawFn, evidence: Evidence | None = None) -> Problem:
    """Small numbers, so that ties are common; "keep" first, as in every table; budgets from impossible to ample."""
    rows: list[Choice] = []
    for layer in range(draw(st.integers(1, 4))):
        pairs = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 5)), max_size=4))
        kept = option(layer, float(draw(st.integers(4, 10))), 0.0)
        rows.append((kept, *(option(layer, float(c), e / 5, s / 5) for c, e, s in pairs)))
    cost: Cost = draw(st.sampled_from(["ms", "macs"]))
    return Problem(tuple(rows), cost, float(draw(st.integers(0, 30))), evidence or Evidence())


def by_hand() -> tuple[Choice, ...]:
    """Three layers of 10 ms. Losses, -log(1 - e^2): 0.010, 0.041, 0.094, 0.174, 0.288, 1.022."""
    return (
        (option(0, 10, 0.0), option(0, 6, 0.1), option(0, 3, 0.4)),
        (option(1, 10, 0.0), option(1, 5, 0.3), option(1, 4, 0.5)),
        (option(2, 10, 0.0), option(2, 7, 0.2), option(2, 2, 0.8)),
    )


def loss(chosen: Sequence[Candidate]) -> float:
    return sum(c.loss for c in chosen)


def choices(problem: Problem) -> list[Choice]:
    return list(itertools.product(*problem.layers))


def feasible(problem: Problem) -> list[Choice]:
    return [chosen for chosen in choices(problem) if problem.fits(chosen)]


def one_per_layer(problem: Problem, chosen: Choice) -> bool:
    return len(chosen) == len(problem.layers) and all(c in row for c, row in zip(chosen, problem.layers, strict=True))


def planted(shape: LayerShape, rank: int, noise: float, seed: int) -> Array:
    """A weight whose output unfolding has `rank` components of equal size and white noise."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.standard_normal((side, rank)))[0] for side in (shape.out, shape.inputs))
    return (u @ v.T + noise * rng.standard_normal((shape.out, shape.inputs))).reshape(shape.weight)


def conv_layer(name: str, weight: Array) -> Layer:
    """A convolution over 8 x 8 places, one output for every place."""
    groups, out, in_, *kernel = weight.shape
    shape = LayerShape(groups, out, in_, tuple(kernel))
    ones = (1,) * len(kernel)
    geometry = Geometry(ones, ones, (1,) * (2 * len(kernel)))
    site = Site(name, (1, groups * in_, 8, 8), (1, groups * out, 8, 8))
    return Layer(name, shape, Form("Conv", 1, 17, geometry), (name,), (site,), name, lambda: weight)


def sliced(layer: Layer, slices: int) -> list[Candidate]:
    """Candidates of k slices of input channels at every rank: what ALDS chooses from, by LAPACK's singular values."""
    weight, (out, in_) = layer.read(), (layer.shape.out, layer.shape.in_)
    parts = [part.reshape(out, -1) for part in np.split(weight[0], slices, axis=1)]
    values = np.stack([np.linalg.svd(part, compute_uv=False) for part in parts])
    largest = np.linalg.norm(weight.reshape(out, -1), 2)
    found: list[Candidate] = []
    for rank in range(1, values.shape[1]):
        stages = (Stage(slices, rank, in_ // slices, layer.shape.kernel, (0, 1)), Stage(1, out, slices * rank, (1, 1)))
        chain = Chain("grouped_svd", stages, "")
        error = float(np.linalg.norm(values[:, rank:]) / np.linalg.norm(values))
        spectral = float(np.sqrt(slices) * values[:, rank].max() / largest)
        macs = chain.macs(layer)
        found.append(
            Candidate(layer.key, chain.method, (slices, rank), chain, error, spectral, chain.params, macs, macs)
        )
    return found


def sliced_problem(layers: Sequence[Layer], share: float, slices: Sequence[int] = (1, 2, 4)) -> Problem:
    rows = tuple((keep(layer), *(c for k in slices for c in sliced(layer, k))) for layer in layers)
    return Problem(rows, "params", share * sum(row[0].params for row in rows))


def table_of(layers: Sequence[Layer], share: float) -> Problem:
    """Every rank of formats of every kind, with all that any rule may need but a measurement."""
    methods = [method for name, method in decompositions().items() if name in TABLED]
    rows: list[Choice] = []
    for layer in layers:
        made = [(m, m.factorize(layer.read())) for m in methods if m.refusal(layer.shape) is None]
        options = [candidate(layer, m, f, rank, 1) for m, f in made for rank in m.ranks(layer.shape, 1)]
        told = with_spectral_errors(options, {m.name: f for m, f in made}, layer.read())
        rows.append((keep(layer), *told))
    weights = {layer.key: layer.read() for layer in layers}

    @cache
    def unfolding(key: str, axes: tuple[int, ...]) -> Unfolding:
        return Unfolding.of(weights[key], axes)

    evidence = Evidence(energy=lambda key: float(np.square(weights[key]).sum()), unfolding=unfolding)
    return Problem(tuple(rows), "macs", share * sum(row[0].macs for row in rows), evidence)
