"""From what the search found to the rows of the report."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from onnx_lowrank.candidates import Candidate
from onnx_lowrank.layer import Kept
from onnx_lowrank.regression import Refitted
from onnx_lowrank.report.model import LayerRow
from onnx_lowrank.search.table import Row


def layer_rows(
    rows: Sequence[Row],
    kept: Sequence[Kept],
    chosen: Sequence[Candidate],
    names: Mapping[str, str],
    *,
    by_time: bool,
    source: str,
    refitted: Mapping[str, Refitted] | None = None,
    put_back: Collection[str] = (),
    data_free: Mapping[str, str] | None = None,
) -> tuple[LayerRow, ...]:
    """One row per weight-bearing node, in graph order.

    Args:
        rows: The candidate table.
        kept: Nodes that were never candidates.
        chosen: The choice for every factorable layer.
        names: Node key -> the name the user knows, in graph order.
        by_time: Whether a chain had to be faster than its layer.
        source: Whether latencies were "measured" or "estimated".
        refitted: Errors with the inputs of the compressed network, by layer key.
        put_back: Keys of layers whose chains were taken out of the finished model again.
        data_free: Why layers were not calibrated, by layer key; None where none was.
    """
    choices = {candidate.key: candidate for candidate in chosen}
    found: dict[str, LayerRow] = {entry.key: _kept_row(entry) for entry in kept}
    for row in rows:
        choice = choices.get(row.layer.key, row.keep)
        for node in row.layer.nodes:
            reason = _reason(row, choice, data_free, by_time=by_time)
            made = _layer_row(row, choice, names.get(node, node), reason, source)
            if row.layer.key in put_back:
                made = replace(made, reason="put back: the finished model is no slower without its chain")
            found[node] = _with_refit(made, (refitted or {}).get(row.layer.key))
    order = {key: position for position, key in enumerate(names)}
    return tuple(found[key] for key in sorted(found, key=lambda key: order.get(key, len(order))))


def _kept_row(kept: Kept) -> LayerRow:
    return LayerRow(
        name=kept.node,
        op=kept.op,
        shape=kept.shape,
        decision="kept",
        method="keep",
        rank=(),
        reason=kept.reason,
        error=0.0,
        params_before=kept.params,
        params_after=kept.params,
        macs_before=kept.macs,
        macs_after=kept.macs,
        latency_ms_before=None,
        latency_ms_after=None,
    )


def _layer_row(row: Row, choice: Candidate, name: str, reason: str, source: str) -> LayerRow:
    layer, share = row.layer, 1 / len(row.layer.nodes)
    before, after = row.keep.ms, choice.ms
    return LayerRow(
        name=name,
        op=layer.form.op,
        shape=str(layer.shape),
        decision="kept" if choice.chain is None else "factorized",
        method=choice.method,
        rank=choice.rank,
        reason=reason,
        error=choice.error,
        params_before=layer.shape.params,
        params_after=choice.params,
        macs_before=layer.macs * share,
        macs_after=choice.macs * share,
        latency_ms_before=None if before is None else before * share,
        latency_ms_after=None if after is None else after * share,
        predicted_loss=choice.loss,
        source=None if before is None else source,
    )


def _with_refit(row: LayerRow, result: Refitted | None) -> LayerRow:
    if result is None or math.isnan(result.error):
        return row
    if not result.regressed:
        return replace(row, error=result.error)
    how = f"refitted: output error {result.error_before:.3g} -> {result.error:.3g}"
    return replace(row, error=result.error_before, error_refit=result.error, reason=f"{row.reason}; {how}")


def _reason(row: Row, choice: Candidate, data_free: Mapping[str, str] | None, *, by_time: bool) -> str:
    remark = _remark(row, data_free or {})
    if choice.chain is not None:
        kind = "weight" if data_free is None or row.layer.key in data_free else "output"
        noted = f", {choice.note}" if choice.note else ""
        return f"{_times(choice, row.keep)}, {kind} error {choice.error:.3g}{noted}{remark}"
    if not row.factorable:
        return row.refusals.get("svd") or next(iter(row.refusals.values()), "its own latency could not be measured")
    if not by_time:
        return f"the goal is reached at less loss elsewhere{remark}"
    timed = [option for option in row.options[1:] if option.ms is not None]
    if not timed:
        return f"none of its chains could be timed ({len(row.options) - 1} tried){remark}"
    best = min(timed, key=lambda option: option.ms or 0.0)
    if (best.ms or 0.0) >= (row.keep.ms or 0.0):
        return f"no chain was measured faster (the best, {_named(best)}: {_times(best, row.keep)}){remark}"
    fastest = f"its fastest chain, {_named(best)}: {_loss(best, row.keep)}"
    return f"the goal is reached at less loss elsewhere ({fastest}){remark}"


def _remark(row: Row, data_free: Mapping[str, str]) -> str:
    """What is special about the layer, to be put behind the reason."""
    if row.layer.key in data_free:
        return f"; not calibrated: {data_free[row.layer.key]}"
    return f"; weight shared by {len(row.layer.nodes)} nodes" if len(row.layer.nodes) > 1 else ""


def _loss(option: Candidate, keep: Candidate) -> str:
    return f"{_times(option, keep)} at error {option.error:.2g}"


def _named(option: Candidate) -> str:
    return f"{option.method} at rank {'x'.join(map(str, option.rank))}"


def _times(option: Candidate, keep: Candidate) -> str:
    if option.ms is None or keep.ms is None:
        return f"{option.macs / keep.macs:.2f} of the MACs"
    return f"{keep.ms:.3g} -> {option.ms:.3g} ms"
