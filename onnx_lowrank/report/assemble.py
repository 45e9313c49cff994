"""The finished file, opened again from disk: timed against the original, compared, weighed, and told in a report."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from onnx_lowrank.accuracy import evaluate, evaluate_original
from onnx_lowrank.data import Dataset
from onnx_lowrank.goals import DEFAULT_GOAL, KeepMacs, KeepParams, LatencyMs, MaxDrop, MaxError, Speedup
from onnx_lowrank.graph import io
from onnx_lowrank.graph.keys import keyed_nodes
from onnx_lowrank.graph.size import file_bytes, parameters
from onnx_lowrank.latency.environment import environment
from onnx_lowrank.metrics import Scores, estimate, paired_difference
from onnx_lowrank.progress import Phases
from onnx_lowrank.report.basis import data_free_layers, data_notes, loss_of, sampling
from onnx_lowrank.report.build import layer_rows
from onnx_lowrank.report.memory import peak_rss_mib
from onnx_lowrank.report.model import Accuracy, Dropped, GoalRow, Latency, Report, Size
from onnx_lowrank.report.remarks import disturbed_prices, remarks_on
from onnx_lowrank.runtime import UnsupportedTypeError
from onnx_lowrank.search.analysis import REPORT_SEED, Analysis
from onnx_lowrank.search.attempt import GOAL_SHARE
from onnx_lowrank.search.bisection import first_difference
from onnx_lowrank.search.source import Source
from onnx_lowrank.search.survey import survey
from onnx_lowrank.settings import Settings
from onnx_lowrank.validation import Validation, compare


def assemble(
    analysis: Analysis, settings: Settings, path: Path, phases: Phases, scores: Scores | None = None
) -> Report:
    """Write the best model found to `path`, check it, and measure everything the report says from that file.

    Args:
        analysis: What was found.
        settings: Options.
        path: Receives the model.
        phases: Timed and shown.
        scores: The original's on the labelled samples, see `original_scores`; None without.

    Raises:
        InvalidResultError: if the checker refuses the file, its signature changed, it gives NaN where the original does
            not, or it misses the error limit that was asked for.
    """
    best = analysis.outcome.best
    refitted = analysis.bench.refitted(best.plan)
    with phases.phase("write"):
        analysis.bench.finish(best.plan, path)
    with phases.phase("validate"):
        stated = isinstance(settings.goal, MaxError) and settings.goal is not DEFAULT_GOAL
        source, limit = analysis.source, settings.goal.value if stated else None
        seed, metric = settings.seed + REPORT_SEED, settings.error_metric
        found = compare(source.path, path, settings.target, source.held_out, limit, seed=seed, error_metric=metric)
        bisected = first_difference(analysis, settings) if settings.bisect else None
        found.require_valid()
        loss = loss_of(analysis, found)
    with phases.phase("profile"):
        latency = _latency(analysis, path)
    with phases.phase("evaluate"):
        accuracy = None if scores is None else _accuracy(source, path, settings, scores)
    with phases.phase("count"):
        size = _size(analysis, path)
        left_out = data_free_layers(analysis)
        remarks = remarks_on(analysis, path, found, latency, left_out or {})
    names, told = _names(analysis), data_notes(analysis, _labelled(source, settings))
    return Report(
        model={"path": str(source.path), "sha256": source.sha256, "opset": analysis.ready.survey.graph.opset},
        target=_target(settings),
        goal=_goal(settings, analysis, latency, size, found, accuracy),
        layers=layer_rows(
            analysis.rows,
            analysis.ready.survey.kept,
            best.chosen,
            names,
            by_time=not isinstance(settings.goal, KeepMacs | KeepParams),
            source=analysis.timer.source,
            refitted=refitted,
            put_back=analysis.outcome.put_back,
            data_free=left_out,
        ),
        latency=latency,
        fidelity=_fidelity(found),
        accuracy=accuracy,
        size=size,
        timings={name: round(seconds, 3) for name, seconds in phases.seconds.items()},
        peak_rss_mib=peak_rss_mib(),
        dropped=tuple(
            Dropped(drop.layer.key, drop.chain.method if drop.chain else "keep", drop.reason)
            for drop in analysis.timer.dropped
        ),
        environment={**environment(settings.target), "measured_on_cores": list(analysis.bench.racer.cores)},
        passes=tuple(
            {
                "name": record.name,
                "options": {
                    key: plain for key, plain in record.options.items() if isinstance(plain, str | int | float)
                },
                "modified": record.modified,
                "seconds": round(record.seconds, 4),
                "notes": [f"{note.node}: {note.text}" for note in record.notes],
            }
            for record in (*(() if best.plan.changes_nothing else analysis.ready.records), best.record)
        ),
        notes=tuple(dict.fromkeys((*analysis.ready.notes, *told, *found.notes, *remarks))),
        bisect=bisected,
        loss=loss,
        calibration=_calibration(analysis, found),
        samples=sampling(analysis, names),
        chains_timed=analysis.timer.timed,
    )


def _latency(analysis: Analysis, path: Path) -> Latency:
    racer = analysis.bench.racer
    final = racer.best_level(path)
    race = racer.repeated([analysis.ready.original, analysis.ready.normalized, final], 3 * racer.seconds)
    speedup, low_rank = race.ratio(0, 2), race.ratio(1, 2)
    before, normalized, after = (timing.median_ms for timing in race.timings)
    levels = {
        "before": analysis.ready.original.level,
        "normalized": analysis.ready.normalized.level,
        "after": final.level,
    }
    return Latency(
        before_ms=before,
        normalized_ms=normalized,
        after_ms=after,
        predicted_ms=normalized * analysis.outcome.best.predicted_share,
        predicted_low_rank_speedup=1 / analysis.outcome.best.predicted_share,
        speedup=speedup.value,
        low_rank_speedup=low_rank.value,
        after_ci95_ms=race.timings[2].ci95_ms,
        ci95=(speedup.low, speedup.high),
        low_rank_ci95=(low_rank.low, low_rank.high),
        samples=race.rounds,
        clock=race.clock.value,
        disturbed=race.disturbed or disturbed_prices(analysis.timer),
        levels=levels,
    )


def original_scores(source: Source, settings: Settings) -> Scores | None:
    """The original's task metric on what is reported on; None without labels, or kernels for its element types.

    Raises:
        InputError: if the metric does not fit the original, or its outputs cannot be scored.
    """
    given = _labelled(source, settings)
    try:
        return None if given is None else evaluate_original(source.path, given, settings.metric, settings.target)
    except UnsupportedTypeError:
        return None


def _labelled(source: Source, settings: Settings) -> Dataset | None:
    """The labelled samples that are reported on."""
    return source.reporting if isinstance(settings.goal, MaxDrop) else source.labelled


def _accuracy(source: Source, path: Path, settings: Settings, before: Scores) -> Accuracy:
    given = _labelled(source, settings)
    assert given is not None  # noqa: S101 - the original was scored on them
    after = evaluate(path, given, settings.metric, settings.target)
    old, new = (estimate(scores, settings.seed, given.sources) for scores in (before, after))
    change = paired_difference(before, after, settings.seed, given.sources)
    return Accuracy(
        metric=settings.metric,
        before=old.value,
        after=new.value,
        ci95=(change.low, change.high),
        ci95_before=(old.low, old.high),
        ci95_after=(new.low, new.high),
        samples=len(given),
    )


def _size(analysis: Analysis, path: Path) -> Size:
    source = analysis.source
    original, optimized = io.load(source.path), io.load(path)
    before = analysis.ready.survey.macs
    after = survey(optimized, analysis.bench.racer, path.parent).macs
    return Size(parameters(original), parameters(optimized), before, after, file_bytes(source.path), file_bytes(path))


def _goal(
    settings: Settings,
    analysis: Analysis,
    latency: Latency,
    size: Size,
    found: Validation,
    accuracy: Accuracy | None,
) -> GoalRow:
    goal, outcome = settings.goal, analysis.outcome
    reached, reason = outcome.reached, outcome.reason
    match goal:
        case Speedup():
            reached = latency.standing(goal) >= GOAL_SHARE
            reason = f"{latency.speedup:.3f}x measured, 95 % interval {latency.ci95[0]:.3f} to {latency.ci95[1]:.3f}"
        case LatencyMs():
            reached = latency.standing(goal) >= GOAL_SHARE
            reason = f"{latency.after_ms:.3g} ms measured"
        case MaxError():
            error = found.error(settings.error_metric)
            reached = reached and error <= goal.value
            reason = f"{settings.error_metric} error {error:.3g} on {found.samples} {found.data} samples; {reason}"
        case MaxDrop() if accuracy is not None:
            drop, low, high = accuracy.before - accuracy.after, -accuracy.ci95[1], -accuracy.ci95[0]
            reached = drop <= goal.value
            span = f"95 % interval of the fall {low:.4g} to {high:.4g}"
            moves = f"falls by {drop:.4g}" if drop >= 0 else f"rises by {-drop:.4g}"
            reason = f"{accuracy.metric} {moves} ({span}) on {accuracy.samples} other samples; {reason}"
        case KeepMacs() | KeepParams() if settings.of == "all":
            pair = (size.macs_after, size.macs_before)
            after, before = pair if isinstance(goal, KeepMacs) else (size.params_after, size.params_before)
            share = after / before if before else 1.0
            reached = share <= goal.value * (1 + 1e-9)
            reason = f"{share:.3f} remain in the written file"
        case KeepMacs() | KeepParams():
            reason = f"{reason} in the factorable layers"
        case _:
            pass
    if not reached and outcome.reason not in reason:
        reason = f"{reason}; {outcome.reason}"
    return GoalRow(goal.kind, goal.value, reached, reason)


def _fidelity(found: Validation) -> dict[str, object]:
    first = found.outputs[0] if found.outputs else None
    return {
        "relative_error": found.relative_error,
        "cosine": first.cosine if first else None,
        "kl": first.kl if first else None,
        "top1_agreement": first.top1_agreement if first else None,
        "samples": found.samples,
        "data": found.data,
        "engine": found.engine,
        "outputs": [output.to_dict() for output in found.outputs],
    }


def _target(settings: Settings) -> dict[str, object]:
    fields = asdict(settings.target)
    fields["shapes"] = [
        {"shapes": {name: list(shape) for name, shape in entry.shapes.items()}, "weight": entry.weight}
        for entry in settings.target.shapes
    ]
    return fields


def _names(analysis: Analysis) -> dict[str, str]:
    return {key: node.name or key for _, node, key in keyed_nodes(analysis.ready.survey.graph)}


def _calibration(analysis: Analysis, found: Validation) -> str:
    source, table = analysis.source, analysis.bench.table
    if source.data is None:
        return "data-free"
    if table is None:
        return f"data-free, reported on {found.samples} given samples"
    samples = table.calibration.samples
    return f"calibrated on {len(samples)} samples, reported on {found.samples} others"
