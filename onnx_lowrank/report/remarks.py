"""What the figures of a report alone do not say, in sentences."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from onnx_lowrank.graph import io
from onnx_lowrank.latency.chains import Pricer
from onnx_lowrank.report.model import Latency
from onnx_lowrank.runtime import open_session
from onnx_lowrank.search.analysis import Analysis
from onnx_lowrank.validation import Validation

# Below this speedup by low rank alone the report says that it is not worth it.
WORTH_IT = 1.1
# The report says that measurements were disturbed if more than this share of the prices was; the final race always.
DISTURBED_PRICES = 0.1


def disturbed_prices(timer: Pricer) -> bool:
    """Whether so many prices were measured beside other work, now or before, that it has to be said."""
    return timer.disturbed > DISTURBED_PRICES * timer.priced


def remarks_on(
    analysis: Analysis, path: Path, found: Validation, latency: Latency, left_out: Mapping[str, str]
) -> list[str]:
    """What the figures alone do not say."""
    remarks: list[str] = []
    gain = latency.low_rank_speedup
    if any(candidate.chain for candidate in analysis.outcome.best.chosen) and gain < WORTH_IT:
        low, high = latency.low_rank_ci95
        remarks.append(
            f"low rank alone makes it {gain:.3f}x as fast ({low:.3f} to {high:.3f}): hardly worth what it costs"
        )
    timer = analysis.timer
    if disturbed_prices(timer):
        remarks.append(
            f"{timer.disturbed} of {timer.priced} latencies of layers and chains were measured beside other work; "
            "`onnx-lowrank latency forget --disturbed` has the next run measure them anew"
        )
    remarks += _fallen_back(analysis, path, latency)
    inputs = [{value.name for value in io.load(p).to_proto().graph.input} for p in (analysis.source.path, path)]
    if gone := inputs[0] - inputs[1]:
        remarks.append(f"{len(gone)} initializers that were listed as inputs too (IR version 3 style) no longer are")
    if free := [c for c in analysis.outcome.best.chosen if c.chain is not None and c.key in left_out]:
        remarks.append(f"{len(free)} factorized layers were not calibrated, and their error is that of the weight")
    if broken := sum(output.non_finite_reference for output in found.outputs):
        remarks.append(f"the original gives {broken} NaN or infinite values, which no figure counts")
    if analysis.source.labelled is not None and analysis.bench.racer.as_float32:
        remarks.append("the task metric was not evaluated: the provider has no kernels for the model's element types")
    return remarks


def _fallen_back(analysis: Analysis, path: Path, latency: Latency) -> list[str]:
    """What another provider runs of the written model, where that was allowed."""
    target = analysis.bench.racer.target
    if not target.allow_fallback or target.provider == "cpu":
        return []
    parts = open_session(analysis.bench.racer.runnable(path), target, latency.levels["after"]).placement()
    if not parts:
        return [f"which nodes {target.provider} left to another provider is unknown: onnxruntime before 1.24"]
    return [
        f"{part.provider} runs {part.nodes} nodes: {', '.join(f'{n} {op}' for op, n in part.operators.items())}"
        for part in parts
        if part.provider != target.provider_name
    ]
