"""What the figures of a report rest on: the samples, and how well the losses predicted from them were met."""

from __future__ import annotations

from collections.abc import Mapping

from onnx_lowrank.calibration.stops import obstacles
from onnx_lowrank.data import Dataset
from onnx_lowrank.report.model import Loss, Sampling
from onnx_lowrank.search.analysis import Analysis
from onnx_lowrank.search.source import SPLIT_SEED
from onnx_lowrank.validation import Validation


def sampling(analysis: Analysis, names: Mapping[str, str]) -> Sampling | None:
    """What the samples were used for; None without any.

    Args:
        analysis: What was found.
        names: Node key -> the name the user knows.
    """
    source, table = analysis.source, analysis.bench.table
    if source.data is None:
        return None
    samples = None if table is None else table.calibration.samples
    held_out = source.data if source.held_out is None else source.held_out
    of = source.data.sources
    positions = {} if table is None else {names.get(key, key): count for key, count in table.positions.items()}
    return Sampling(
        origin=source.data.origin,
        fitted=len(samples.fit) if samples else 0,
        judged=len(samples.judge) if samples else 0,
        held_out=len(held_out),
        sources=None if of is None else len(set(of.tolist())),
        positions=positions,
        seed=SPLIT_SEED,
    )


def data_notes(analysis: Analysis, labelled: Dataset | None) -> tuple[str, ...]:
    """What is to be known about the samples beside what the comparison of outputs says of them.

    Args:
        analysis: What was found.
        labelled: The labelled samples that are reported on.
    """
    table = analysis.bench.table
    told = () if labelled is None else tuple(f"--eval: {note}" for note in labelled.notes)
    return told if table is None else (*table.calibration.samples.notes, *told)


def data_free_layers(analysis: Analysis) -> dict[str, str] | None:
    """Layer key -> why it was not calibrated, in words; None where no layer was."""
    table = analysis.bench.table
    if table is None:
        return None
    why = obstacles(analysis.bench.graph, table.layers, table.calibration.samples.memory_limit)
    left_out = (layer.key for layer in table.layers if layer.key not in table.means)
    return {key: why.get(key, "its input is the same for all samples") for key in left_out}


def loss_of(analysis: Analysis, found: Validation) -> Loss | None:
    """Predicted and measured damage to the outputs; None without samples."""
    table, best = analysis.bench.table, analysis.outcome.best
    if table is None:
        return None
    if all(candidate.chain is None for candidate in best.chosen):
        return Loss(best.loss, found.loss, found.samples)
    without_refit = table.measure(best.chosen)
    agreement = without_refit / best.loss if best.loss > 0 else None
    return Loss(best.loss, found.loss, found.samples, without_refit, table.probed_on, agreement)
