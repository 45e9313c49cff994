"""What there is to work on: the normalized graph, its layers with the shapes they meet, and samples to run it on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from onnx import TensorProto

from onnx_lowrank import runtime
from onnx_lowrank.data import Dataset
from onnx_lowrank.graph import io, keys
from onnx_lowrank.graph.check import inferred_shapes
from onnx_lowrank.graph.layers import layers, shapes_as_trace
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.layer import Kept, Layer, NodeShapes
from onnx_lowrank.pass_manager import PassManager, PassRecord
from onnx_lowrank.search.racer import Racer, Sample
from onnx_lowrank.signature import index_bounds, signature_of
from onnx_lowrank.synthetic import resolve_shapes, sized, synthetic_feeds
from onnx_lowrank.target import Target
from onnx_lowrank.transform import Pass

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Survey:
    """A model, taken apart.

    Args:
        graph: The normalized model.
        layers: What can be factored.
        kept: Weight-bearing nodes that stay as they are, each with a reason.
    """

    graph: Graph
    layers: tuple[Layer, ...]
    kept: tuple[Kept, ...]

    @property
    def macs(self) -> float:
        """Multiply-accumulates of all weight-bearing nodes per run."""
        return sum(layer.macs for layer in self.layers) + sum(node.macs for node in self.kept)


def make_samples(
    graph: Graph, target: Target, data: Dataset | None, seed: int
) -> tuple[tuple[Sample, ...], tuple[str, ...]]:
    """One sample per shape set of the target, and notes on every dimension that had to be guessed.

    Args:
        graph: The model.
        target: Gives the shapes.
        data: Where the target leaves shapes open, the first sample of these decides, by itself.
        seed: Of synthetic inputs.

    Raises:
        InputError: if the target's shapes do not fit the signature.
    """
    bare = graph.to_proto(_without_values)
    signature = signature_of(bare)
    if data is not None and not target.shapes:
        feeds = next(iter(data.feeds(1)))
        return (Sample(feeds),), tuple(sized(spec, feeds[spec.name].shape) for spec in signature.inputs if spec.varies)
    bounds = index_bounds(bare)
    samples: list[Sample] = []
    notes: list[str] = []
    for shapes, weight in [(entry.shapes, entry.weight) for entry in target.shapes] or [({}, 1.0)]:
        resolved, remarks = resolve_shapes(signature.inputs, shapes)
        samples.append(Sample(synthetic_feeds(signature.inputs, resolved, seed, bounds), weight))
        notes.extend(remarks)
    return tuple(samples), tuple(dict.fromkeys(notes))


def _without_values(tensor: TensorProto) -> TensorProto:
    bare = TensorProto(name=tensor.name, data_type=tensor.data_type)
    bare.dims.extend(tensor.dims)
    return bare


def normalize(
    graph: Graph, passes: Sequence[Pass], measured: Sequence[Pass], racer: Racer, path: Path
) -> list[PassRecord]:
    """Bring `graph` into the form decompositions understand, in place, and save it as `path`.

    Args:
        graph: The model as read.
        passes: Exact rewrites that are always applied.
        measured: Exact rewrites that stay only where the model was measured faster with them; they come first,
            while the patterns they look for are whole.
        racer: Measures.
        path: Receives the normalized model.

    Raises:
        PassError: if a pass fails.
    """
    start = graph.snapshot()
    records = PassManager(passes).run(graph)
    io.save(graph, path)
    for step in measured:
        without = graph.snapshot()
        graph.restore(start)
        (record,) = PassManager([step]).run(graph)
        if not record.modified:
            graph.restore(without)
            continue
        more = [record, *PassManager(passes).run(graph)]
        variant = path.with_name(f"with_{step.name}.onnx")
        io.save(graph, variant)
        if racer.gains(path, variant):
            records = more
            io.save(graph, path)
        else:
            graph.restore(without)
    return records


def survey(graph: Graph, racer: Racer, folder: Path) -> Survey:
    """Find the layers of a model and the shapes they meet when it runs.

    Args:
        graph: The model.
        racer: Gives the samples and where to run them.
        folder: For the file that onnxruntime traces.

    Raises:
        InputError: if the model cannot be run on the samples, or a weight is not finite.
    """
    found, kept = layers(graph, trace(graph, racer, folder))
    return Survey(graph, tuple(found), tuple(kept))


def trace(graph: Graph, racer: Racer, folder: Path) -> dict[str, list[NodeShapes]]:
    """The shapes every node meets on the racer's samples, by the node's key; inferred where the model does not run.

    Raises:
        InputError: if the model cannot be run on the samples.
    """
    named = Graph(keys.traceable(graph), graph.folder, graph.external)
    path = folder / "traced.onnx"
    io.save(named, path)
    try:
        return _run_all(racer.runnable(path), racer)
    except runtime.UnsupportedTypeError as error:
        logger.warning("shapes are inferred: %s", error)
        sizes = {name: array.shape for name, array in racer.samples[0].feeds.items()}
        return shapes_as_trace(graph, inferred_shapes(graph, sizes))
    finally:
        for leftover in folder.glob("traced.onnx*"):
            leftover.unlink()


def runs_natively(path: Path, target: Target) -> tuple[bool, tuple[str, ...]]:
    """Whether the provider has kernels for the model's element types, and notes on what runs elsewhere.

    Raises:
        InputError, ProviderError: for whatever else keeps the model from running.
    """
    try:
        session = runtime.open_session(path, target, target.levels[0])
    except runtime.UnsupportedTypeError as error:
        logger.info("timed as float32: %s", error)
        return False, ()
    return True, on_host_note(session.on_host, target)


def on_host_note(nodes: Sequence[str], target: Target) -> tuple[str, ...]:
    """What to say about computations of shapes that onnxruntime keeps on the CPU."""
    if not nodes:
        return ()
    more = f" and {len(nodes) - 3} more" if len(nodes) > 3 else ""
    return (f"shapes are computed on the CPU, everything else on {target.provider}: {', '.join(nodes[:3])}{more}",)


def _run_all(path: Path, racer: Racer) -> dict[str, list[NodeShapes]]:
    merged: dict[str, list[NodeShapes]] = {}
    anywhere = replace(racer.target, allow_fallback=True)
    for sample in racer.samples:
        for key, shapes in runtime.trace(path, racer.fed(sample), anywhere).items():
            merged.setdefault(key, []).extend(replace(s, count=s.count * sample.weight) for s in shapes)
    return merged
