"""Where two models part: tensors both of them have, in graph order, with the distance between their values.

Where the optimized file carries our stamps these tensors are the outputs of the rewritten layers, which keep the names
of the layers they replace; in any other file they are all that bear the same name. They become outputs of copies in
memory; optimizations that would fuse them away are lost, which changes values by rounding only.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import onnx
from onnx import GraphProto

from onnx_lowrank.data import Dataset
from onnx_lowrank.errors import InputError
from onnx_lowrank.fidelity import FidelityMeter
from onnx_lowrank.rewrite import stamps
from onnx_lowrank.side_by_side import batches_for, open_pair
from onnx_lowrank.target import Target


@dataclass(frozen=True)
class TensorError:
    """A tensor of both models.

    Args:
        tensor: Its name.
        node: The optimized model's node that writes it.
        rewrite: What the rewrite says about itself, or the operator where the file carries no stamps.
        error: Relative L2 error.
        non_finite: Values that are NaN or infinite in the optimized model only.
    """

    tensor: str
    node: str
    rewrite: str
    error: float
    non_finite: int = 0


@dataclass(frozen=True)
class Divergence:
    """The result.

    Args:
        tolerance: Largest relative error that passes.
        first: The first tensor beyond it, or None.
        tensors: Everything compared, in graph order.
        samples: Samples run.
        data: "held-out" or "synthetic".
    """

    tolerance: float
    first: TensorError | None
    tensors: tuple[TensorError, ...]
    samples: int
    data: str

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        compared = f"{len(self.tensors)} tensors compared on {self.samples} {self.data} samples"
        if self.first is None:
            worst = max((entry.error for entry in self.tensors), default=0.0)
            return f"no tensor differs by more than {self.tolerance:g} (largest error {worst:.3g}; {compared})"
        at = self.tensors.index(self.first)
        before = f"{self.tensors[at - 1].error:.3g} at the one before" if at else "the first one"
        broken = f", {self.first.non_finite} values no longer finite" if self.first.non_finite else ""
        return (
            f"first beyond {self.tolerance:g}: {self.first.node} ({self.first.rewrite}), relative error "
            f"{self.first.error:.3g} in tensor {self.first.tensor!r}{broken}, {before}; {compared}"
        )


def first_divergence(
    original: Path,
    optimized: Path,
    target: Target,
    dataset: Dataset | None = None,
    tolerance: float = 0.01,
    *,
    seed: int = 0,
) -> Divergence:
    """Compare tensors inside two models and name the first, in graph order, that differs too much.

    Args:
        original: The model before.
        optimized: The model after; need not be ours.
        target: Where to run, and shapes of synthetic inputs.
        dataset: Samples, or None for seeded synthetic inputs.
        tolerance: Largest relative L2 error that passes.
        seed: Seed of the synthetic inputs.

    Raises:
        InputError: if the models have no tensor in common, or cannot be run.
        ProviderError: if the provider cannot run them.
    """
    before, after = (onnx.load(path, load_external_data=False) for path in (original, optimized))
    known = {name for node in before.graph.node for name in node.output if name}
    common = [(name, node) for node in after.graph.node for name in node.output if name in known]
    rewritten = {name: text for name, text in _rewrites(after.graph).items() if name in known}
    watched = {name: node for name, node in common if not rewritten or name in rewritten}
    if not watched:
        raise InputError(f"{optimized} without a tensor of {original}", "a version of that model", "compare others")
    pair = open_pair(original, optimized, target, tuple(watched))
    batches, _ = batches_for(before, target, dataset, seed=seed, small=not pair.exact)
    meter, samples = FidelityMeter(), 0
    for reference, candidate, count in pair.outputs(batches):
        meter.update({name: reference[name] for name in watched}, candidate, count)
        samples += count
    found = {output.name: output for output in meter.result()}
    tensors = tuple(
        TensorError(
            tensor=name,
            node=node.name or name,
            rewrite=rewritten.get(name, node.op_type),
            error=found[name].relative,
            non_finite=found[name].non_finite_new,
        )
        for name, node in watched.items()
        if name in found
    )
    first = next((entry for entry in tensors if entry.non_finite or not entry.error <= tolerance), None)
    return Divergence(tolerance, first, tensors, samples, "synthetic" if dataset is None else "held-out")


def _rewrites(graph: GraphProto) -> dict[str, str]:
    """Every tensor a stamped node of the main graph writes, and the stamp in words."""
    stamped = ((node, dict(stamps(node))) for node in graph.node)
    return {
        name: f"{stamp['method']} at rank {stamp.get('rank', '?')}"
        for node, stamp in stamped
        if "method" in stamp
        for name in node.output
    }
