"""Every weight-bearing layer of a model: shape, share of the work, spectrum, verdict."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.markup import escape
from rich.table import Table

from onnx_lowrank.decomposition import Decomposition
from onnx_lowrank.graph.size import parameters
from onnx_lowrank.latency.chains import ChainTimer, Job
from onnx_lowrank.latency.table import LatencyTable
from onnx_lowrank.layer import Kept, Layer
from onnx_lowrank.linalg import spectrum
from onnx_lowrank.progress import Phases
from onnx_lowrank.providers import require_provider
from onnx_lowrank.search.prepare import prepare
from onnx_lowrank.search.source import read_source
from onnx_lowrank.settings import Settings

ENERGIES = (0.9, 0.99)


@dataclass(frozen=True)
class InspectedLayer:
    """One weight-bearing node (or the nodes that share one weight).

    Args:
        name: The node.
        op: Its operator.
        shape: Of the weight.
        params: Weights.
        params_share: Of all parameters of the model.
        macs: Multiply-accumulates per run.
        macs_share: Of all weight-bearing nodes.
        ms: Measured latency of the layer alone; None where it was not timed.
        full_rank: Rank of the S x (C kh kw) unfolding if nothing is cut.
        energy_ranks: Smallest ranks that keep 90 % and 99 % of its squared singular values.
        effective_rank: exp of the entropy of the normalized singular values.
        verdict: What can be done with it, in words.
    """

    name: str
    op: str
    shape: str
    params: int
    params_share: float
    macs: float
    macs_share: float
    ms: float | None
    full_rank: int | None
    energy_ranks: tuple[int, ...]
    effective_rank: float | None
    verdict: str


def inspect(model: Path | str, settings: Settings | None = None, phases: Phases | None = None) -> list[InspectedLayer]:
    """Look at a model; nothing is written.

    Raises:
        InputError: if the model or the data cannot be used.
    """
    settings, phases = settings or Settings(), phases or Phases()
    require_provider(settings.target)
    with phases.phase("read"):
        source = read_source(Path(model), settings.calibration, preprocess=settings.preprocess)
    with tempfile.TemporaryDirectory(prefix="onnx-lowrank-") as folder:
        ready = prepare(source, settings, Path(folder), phases)
    found, total = ready.survey, parameters(ready.survey.graph)
    with LatencyTable() as table, phases.phase("time layers") as advance:
        timer = ChainTimer(settings.target, table, ready.normalized.level)
        prices = timer.price([Job(layer) for layer in found.layers], advance)
    rows = [
        _layer(layer, ms, total, found.macs, tuple(ready.methods.values()))
        for layer, ms in zip(found.layers, prices, strict=True)
    ]
    return rows + [_kept(node, total, found.macs) for node in found.kept]


def render(rows: Sequence[InspectedLayer]) -> Table:
    """An aligned table."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("layer", overflow="fold")
    for name in ("op", "shape"):
        table.add_column(name)
    for name in ("params", "MACs", "ms", "rank", *(f"{energy:.0%}" for energy in ENERGIES), "effective"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold")
    for row in rows:
        table.add_row(
            escape(row.name),
            row.op,
            row.shape,
            f"{row.params_share:.1%}",
            f"{row.macs_share:.1%}",
            "" if row.ms is None else f"{row.ms:.3g}",
            "" if row.full_rank is None else str(row.full_rank),
            *(str(rank) for rank in row.energy_ranks or ("",) * len(ENERGIES)),
            "" if row.effective_rank is None else f"{row.effective_rank:.1f}",
            escape(row.verdict),
        )
    return table


def _layer(
    layer: Layer, ms: float | None, params: int, macs: float, methods: Sequence[Decomposition]
) -> InspectedLayer:
    weight = layer.read()
    values = spectrum(weight.reshape(layer.shape.groups, layer.shape.out, -1)).values
    squares = np.square(values).sum(axis=0)
    kept = squares.cumsum() / squares.sum()
    shares = values.sum(axis=0) / values.sum()
    shares = shares[shares > 0]
    accepted = [method.name for method in methods if method.refusal(layer.shape) is None]
    return InspectedLayer(
        name=layer.nodes[0],
        op=layer.form.op,
        shape=str(layer.shape),
        params=layer.shape.params,
        params_share=layer.shape.params / max(params, 1),
        macs=layer.macs,
        macs_share=layer.macs / max(macs, 1),
        ms=ms,
        full_rank=values.shape[1],
        energy_ranks=tuple(int(np.searchsorted(kept, energy - 1e-12)) + 1 for energy in ENERGIES),
        effective_rank=float(np.exp(-(shares * np.log(shares)).sum())),
        verdict=f"can become {', '.join(accepted)}" if accepted else "no decomposition accepts it",
    )


def _kept(node: Kept, params: int, macs: float) -> InspectedLayer:
    return InspectedLayer(
        name=node.node,
        op=node.op,
        shape=node.shape,
        params=node.params,
        params_share=node.params / max(params, 1),
        macs=node.macs,
        macs_share=node.macs / max(macs, 1),
        ms=None,
        full_rank=None,
        energy_ranks=(),
        effective_rank=None,
        verdict=f"stays: {node.reason}",
    )
