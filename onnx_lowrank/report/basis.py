"""What the figures of a report rest on: the samples, and how well the losses predicted from them were met."""

from __future__ import annotations

from onnx_lowrank.calibration.stops import obstacles
from onnx_lowrank.report.model import Loss
from onnx_lowrank.search.analysis import Analysis
from onnx_lowrank.validation import Validation


def data_free_layers(analysis: Analysis) -> dict[str, str] | None:
    """Layer key -> why it was not calibrated, in words; None where no layer was."""
    table = analysis.bench.table
    if table is None:
        return None
    why = obstacles(analysis.bench.graph, table.layers)
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
