"""A model normalized and surveyed, ready to be priced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from onnx_lowrank.catalogue import default_decompositions, split
from onnx_lowrank.decomposition import Decomposition
from onnx_lowrank.graph.keys import keyed_nodes
from onnx_lowrank.layer import Kept, Layer
from onnx_lowrank.pass_manager import PassRecord
from onnx_lowrank.passes.normalize import DEFAULT_NORMALIZE, MEASURED_NORMALIZE
from onnx_lowrank.progress import Phases
from onnx_lowrank.search.device import Device
from onnx_lowrank.search.racer import Contestant, Racer
from onnx_lowrank.search.source import Source
from onnx_lowrank.search.survey import Survey, make_samples, normalize, runs_natively, survey
from onnx_lowrank.search.tuning import tuned
from onnx_lowrank.settings import Settings


@dataclass(frozen=True, eq=False)
class Prepared:
    """A model normalized and surveyed, ready to be priced.

    Args:
        survey: Layers and kept nodes of the normalized model.
        records: What the graph passes did.
        methods: Allowed decompositions by name.
        racer: Times models on the target's samples.
        original: The user's file at its best level.
        normalized: The normalized file at its best level.
        notes: What the user should know.
    """

    survey: Survey
    records: Sequence[PassRecord]
    methods: dict[str, Decomposition]
    racer: Racer
    original: Contestant
    normalized: Contestant
    notes: tuple[str, ...]


def tuned_for(source: Source, settings: Settings, phases: Phases) -> Settings:
    """Settings completed with the provider options the source runs fastest with."""
    if settings.target.variants() == (settings.target,):
        return settings
    samples, _ = make_samples(source.graph, settings.target, source.data, settings.seed)
    return tuned(source.path, samples, settings, phases)


def prepare(source: Source, settings: Settings, folder: Path, phases: Phases, there: Device | None = None) -> Prepared:
    """Normalize the source's graph, in place, and find its layers.

    Args:
        source: The model and its data; its graph is edited.
        settings: Options.
        folder: For the normalized model.
        phases: Timed and shown.
        there: The device that counts instead of this machine.

    Raises:
        LowRankError: if the model does not run on the target, a pass fails, or a weight is not finite.
    """
    passes, methods = split(settings.passes)
    with phases.phase("baseline"):
        samples, notes = make_samples(source.graph, settings.target, source.data, settings.seed)
        native, remarks = runs_natively(source.path, settings.target)
        if there is None:
            racer = Racer(settings.target, samples, folder, as_float32=not native)
        else:
            racer = there.racer(settings.target, samples, folder, as_float32=not native)
        # A search of a second must not spend eight on one race.
        racer.seconds = min(racer.seconds, settings.time_limit or racer.seconds)
        original = racer.best_level(source.path)
    with phases.phase("normalize"):
        path = folder / "normalized.onnx"
        records = normalize(
            source.graph, passes or DEFAULT_NORMALIZE, () if passes else MEASURED_NORMALIZE, racer, path
        )
        normalized = racer.best_level(path)
        found = pinned(survey(source.graph, racer, folder), settings)
    if not native:
        notes = (*notes, f"{settings.target.provider_name} has no kernels for its element types: timed as float32")
    notes = (*notes, *remarks)
    allowed = {method.name: method for method in methods} or default_decompositions()
    return Prepared(found, records, allowed, racer, original, normalized, notes)


def pinned(found: Survey, settings: Settings) -> Survey:
    """The survey with the layers the user pinned among the kept ones."""
    names = {key: node.name or key for _, node, key in keyed_nodes(found.graph)}
    known = {name for key in (*(n for layer in found.layers for n in layer.nodes), *(k.key for k in found.kept))
             for name in (key, names[key])}  # fmt: skip
    settings.require_matches(known)
    free: list[Layer] = []
    kept = list(found.kept)
    for layer in found.layers:
        reason = settings.pinned(*layer.nodes, *(names[node] for node in layer.nodes))
        if reason is None:
            free.append(layer)
            continue
        kept.extend(
            Kept(
                node,
                names[node],
                layer.form.op,
                reason,
                str(layer.shape),
                layer.shape.params,
                layer.macs / len(layer.nodes),
            )
            for node in layer.nodes
        )
    return replace(found, layers=tuple(free), kept=tuple(kept))
