"""Does it pay to refit layers that are not factored, to repair what was lost in front of them?

    python -m benchmarks.kept_layers [embedded ocr_rec minilm] [--share 0.5]

One plan per model, realised twice: all layers fitted, and only those that become chains. Rows go to
`benchmarks/results/kept_layers.json`, evaluated on the task as everywhere else.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.accuracy.experiment import task
from benchmarks.fashion import EMBEDDED, named
from benchmarks.zoo import results
from benchmarks.zoo.cache import default_cache
from benchmarks.zoo.model import ZooModel
from onnx_lowrank.calibration.affordable import usable
from onnx_lowrank.catalogue import all_decompositions, split
from onnx_lowrank.graph import io
from onnx_lowrank.graph.layers import layers
from onnx_lowrank.pass_manager import PassManager
from onnx_lowrank.passes.factor import Factor
from onnx_lowrank.plan import Plan
from onnx_lowrank.progress import Phases
from onnx_lowrank.refit import arrays, chosen_layers, refit
from onnx_lowrank.search.source import read_source
from onnx_lowrank.target import Target

KEYS = ("model", "goal", "kept_layers")


def main(words: Sequence[str] | None = None) -> int:
    """Plan, realise both ways, evaluate, record, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=[EMBEDDED, "ocr_rec", "minilm"], metavar="MODEL")
    parser.add_argument("--share", type=float, default=0.5, help="of the factorable layers' multiply-accumulates")
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    asked = parser.parse_args(words)
    rows: list[dict[str, results.Scalar]] = []
    for name in asked.models:
        with tempfile.TemporaryDirectory() as folder:
            rows += both(named(name), asked.share, Path(folder))
        for row in rows[-2:]:
            results.put("kept_layers", row, KEYS, asked.results)
    print(results.table(rows, [key for key in rows[0] if not key.endswith("seconds")]))
    return 0


def both(model: ZooModel, share: float, folder: Path) -> list[dict[str, results.Scalar]]:
    """Rows of one model."""
    original = model.build(default_cache())
    data, file = original.with_name("calibration.npz"), folder / "plan.json"
    shapes = [word for shape in model.inputs for word in ("--shape", shape)]
    words = ["--threads", "1", "--keep-macs", f"{share:g}", "--of", "factorable", "--calibration", str(data), *shapes]
    command = [sys.executable, "-m", "onnx_lowrank", "plan", str(original), "-o", str(file), *words]
    subprocess.run(command, check=False, capture_output=True)  # a goal that is missed has a plan, too
    rows: list[dict[str, results.Scalar]] = []
    for fitted in (True, False):
        out = folder / f"{fitted}.onnx"
        count = realise(original, data, Plan.read(file), out, kept_layers=fitted)
        what: dict[str, results.Scalar] = {"model": model.name, "goal": f"keep-macs {share:g}"}
        rows.append({**what, "kept_layers": "fitted" if fitted else "left", "kept_fitted": count, **task(model, out)})
    return rows


def realise(original: Path, data: Path, plan: Plan, out: Path, *, kept_layers: bool) -> int:
    """What `onnx-lowrank apply` does; how many layers that keep their shape were given new weights.

    Args:
        original: The model.
        data: Its calibration samples.
        plan: Made with them.
        out: Receives the result.
        kept_layers: Whether layers that keep their shape are fitted.
    """
    source = read_source(original, data)
    if source.samples is None:
        raise SystemExit(f"{data}: too few samples")
    passes, methods = split(plan.passes)
    allowed = all_decompositions() | {method.name: method for method in methods}
    target = Target().exact()
    PassManager(passes).run(source.graph)
    everything = chosen_layers(layers(source.graph, check=False)[0], plan, allowed)
    chosen = [one for one in everything if kept_layers or one.method is not None]
    with tempfile.TemporaryDirectory() as folder, Phases().phase("refit") as advance:
        samples = usable(source.samples, source.path, source.graph, target, Path(folder))
        found = refit(source.graph, chosen, samples, target, Path(folder), advance)
    PassManager([Factor(plan, allowed, fits=arrays(found))]).run(source.graph)
    io.save(source.graph, out)
    kept = {one.layer.key for one in everything if one.method is None}
    return sum(key in kept and one.fit is not None for key, one in found.items())


if __name__ == "__main__":
    sys.exit(main())
