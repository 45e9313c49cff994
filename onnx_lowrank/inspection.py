"""Every weight-bearing layer of a model: shape, share of the work, spectrum, verdict."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.markup import escape
from rich.table import Table

from onnx_lowrank.calibration.affordable import usable
from onnx_lowrank.calibration.input_moments import grams
from onnx_lowrank.calibration.walk import CannotCutError
from onnx_lowrank.decomposition import Decomposition
from onnx_lowrank.graph.size import parameters
from onnx_lowrank.latency.chains import ChainTimer
from onnx_lowrank.latency.pieces import Job
from onnx_lowrank.latency.table import LatencyTable
from onnx_lowrank.layer import Kept, Layer
from onnx_lowrank.linalg import whitened_rows
from onnx_lowrank.progress import Phases
from onnx_lowrank.providers import require_provider
from onnx_lowrank.search.prepare import Prepared, prepare
from onnx_lowrank.search.source import Source, source_of
from onnx_lowrank.settings import Settings
from onnx_lowrank.spectra import ENERGIES, Measures, Unfolding

logger = logging.getLogger(__name__)
SHOWN_ENERGIES = (0.9, 0.99)


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
        spectrum: Measures of that unfolding; None where nothing can be done with the layer.
        whitened: The same in the metric of the layer's outputs, M G^(1/2) with the second moment G of its inputs: how
            low the rank of what it computes is. None without samples.
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
    spectrum: Measures | None = None
    whitened: Measures | None = None


def inspect(
    model: Path | str, settings: Settings | None = None, phases: Phases | None = None, *, whitened: bool = False
) -> list[InspectedLayer]:
    """Look at a model; nothing is written.

    Args:
        model: The ONNX file.
        settings: Target, samples and which layers and decompositions to look at.
        phases: Timed and shown.
        whitened: Run the samples through the network, for the spectra of what its layers compute.

    Raises:
        InputError: if the model or the data cannot be used.
    """
    settings, phases = settings or Settings(), phases or Phases()
    require_provider(settings.target)
    with phases.phase("read"):
        source = source_of(Path(model), settings)
    with tempfile.TemporaryDirectory(prefix="onnx-lowrank-") as folder:
        ready = prepare(source, settings, Path(folder), phases)
        with phases.phase("moments"):
            computed = _whitened(source, ready, settings, Path(folder)) if whitened else {}
    found, total = ready.survey, parameters(ready.survey.graph)
    with LatencyTable() as table, phases.phase("time layers") as advance:
        timer = ChainTimer(settings.target, table, ready.normalized.level)
        prices = timer.price([Job(layer) for layer in found.layers], advance)
    rows = [
        replace(_layer(layer, ms, total, found.macs, tuple(ready.methods.values())), whitened=computed.get(layer.key))
        for layer, ms in zip(found.layers, prices, strict=True)
    ]
    return rows + [_kept(node, total, found.macs) for node in found.kept]


def render(rows: Sequence[InspectedLayer]) -> Table:
    """An aligned table."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("layer", overflow="fold")
    for name in ("op", "shape"):
        table.add_column(name)
    for name in ("params", "MACs", "ms", "rank", *(f"{energy:.0%}" for energy in SHOWN_ENERGIES), "effective"):
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
            *(str(rank) for rank in row.energy_ranks or ("",) * len(SHOWN_ENERGIES)),
            "" if row.effective_rank is None else f"{row.effective_rank:.1f}",
            escape(row.verdict),
        )
    return table


def render_spectra(rows: Sequence[InspectedLayer]) -> Table:
    """An aligned table of the measures, of the weight and, where there are samples, of what it computes from them."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("layer", overflow="fold")
    table.add_column("of")
    energies = (f"{energy:.0%}" for energy in ENERGIES)
    for name in ("rank", "effective", "stable", *energies, "EVB", "Gini", "Hoyer", "nuclear"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        for number, (of, found) in enumerate((("weight", row.spectrum), ("outputs", row.whitened))):
            if found is not None:
                table.add_row("" if number else escape(row.name), of, *_figures(found))
    return table


def unreached(rows: Sequence[InspectedLayer]) -> list[str]:
    """Layers without a spectrum of their outputs: in bodies, with shared weights, or behind what is no array."""
    return [row.name for row in rows if row.spectrum is not None and row.whitened is None]


def _figures(found: Measures) -> tuple[str, ...]:
    return (
        str(found.full_rank),
        f"{found.effective_rank:.1f}",
        f"{found.stable_rank:.2f}",
        *(str(rank) for rank in found.energy_ranks),
        str(found.evb_rank),
        f"{found.gini:.3f}",
        f"{found.hoyer:.3f}",
        f"{found.nuclear_norm:.3g}",
    )


def _whitened(source: Source, ready: Prepared, settings: Settings, folder: Path) -> dict[str, Measures]:
    """Measures of M G^(1/2) by layer key, of the layers a walk can stop at."""
    if source.samples is None or ready.racer.as_float32:
        return {}
    target = settings.target.for_samples()
    room = folder / "activations"
    room.mkdir()
    found: dict[str, Measures] = {}
    try:
        samples = usable(source.samples, source.path, source.graph, target, room)
        for layer, gram in grams(source.graph, ready.survey.layers, samples, target, room):
            matrices = layer.read().astype(np.float64).reshape(layer.shape.groups, layer.shape.out, -1)
            pairs = zip(matrices, gram, strict=True)
            values = np.stack([whitened_rows(matrix, moment, 1)[1] for matrix, moment in pairs])
            found[layer.key] = Measures.of(values, (layer.shape.out, layer.shape.inputs))
    except CannotCutError as error:
        logger.warning("no spectra of outputs: %s would have to be carried along", error)
    return found


def _layer(
    layer: Layer, ms: float | None, params: int, macs: float, methods: Sequence[Decomposition]
) -> InspectedLayer:
    whole = Unfolding.of(layer.read(), tuple(range(len(layer.shape.kernel))))
    found = Measures.of(whole.values, whole.shape)
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
        full_rank=found.full_rank,
        energy_ranks=tuple(found.energy_ranks[ENERGIES.index(energy)] for energy in SHOWN_ENERGIES),
        effective_rank=found.effective_rank,
        verdict=f"can become {', '.join(accepted)}" if accepted else "no decomposition accepts it",
        spectrum=found,
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
