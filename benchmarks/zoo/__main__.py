"""Command line of the zoo: `python -m benchmarks.zoo fetch|eval|table`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx

from benchmarks.zoo import results
from benchmarks.zoo.cache import default_cache
from benchmarks.zoo.evaluate import evaluate
from benchmarks.zoo.model import ZooModel
from benchmarks.zoo.models import all_models
from benchmarks.zoo.source import SourceError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    options = _parser().parse_args(arguments)
    match options.verb:
        case "fetch":
            return fetch([_known(name) for name in options.names or all_models()], options.cache)
        case "eval":
            return evaluate_one(_known(options.name), options.model, options.cache, as_json=options.json)
        case _:
            print(results.render())
            return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    cached = argparse.ArgumentParser(add_help=False)
    cached.add_argument("--cache", type=Path, default=default_cache(), help="folder of the zoo (%(default)s)")
    fetching = verbs.add_parser("fetch", parents=[cached], help="download and export models into the cache")
    fetching.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    evaluating = verbs.add_parser("eval", parents=[cached], help="task metric and fidelity of a model file")
    evaluating.add_argument("name", metavar="NAME")
    evaluating.add_argument("model", type=Path, nargs="?", metavar="MODEL.onnx", help="default: the original")
    evaluating.add_argument("--json", action="store_true", help="print one JSON object")
    verbs.add_parser("table", help="render benchmarks/results/*.json as markdown")
    return parser


def _known(name: str) -> ZooModel:
    """The model of that name; exits with 2 if there is none."""
    if name not in all_models():
        _parser().error(f"got model {name!r}, expected one of {', '.join(all_models())}")
    return all_models()[name]


def fetch(models: Sequence[ZooModel], cache: Path) -> int:
    """Build models and print what the cache holds; returns 1 if one failed."""
    row = "{:<16} {:>5} {:>12} {:>9}  {:<34} {}".format
    print(row("name", "opset", "params", "MiB", "timing input", "ok"))
    failed = 0
    for model in models:
        try:
            path = model.build(cache)
        except (SourceError, ImportError) as error:
            failed += 1
            print(row(model.name, "-", "-", "-", " ".join(model.inputs), f"no: {error}"))
            continue
        opset, params = _facts(path)
        size = f"{path.stat().st_size / 2**20:.1f}"
        print(row(model.name, opset, f"{params:,}", size, " ".join(model.inputs), "yes"), flush=True)
    return int(failed > 0)


def _facts(path: Path) -> tuple[int, int]:
    """Opset of the default domain and number of floating-point weights, constants included."""
    model = onnx.load(path)
    graph = model.graph
    constants = [a.t for node in graph.node if node.op_type == "Constant" for a in node.attribute if a.name == "value"]
    floats = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE}
    params = sum(int(np.prod(t.dims)) for t in [*graph.initializer, *constants] if t.data_type in floats)
    return next(o.version for o in model.opset_import if not o.domain), params


def evaluate_one(model: ZooModel, path: Path | None, cache: Path, *, as_json: bool) -> int:
    """Evaluate a model file against its original and print the result."""
    result = evaluate(model, cache, path or model.build(cache))
    if as_json:
        print(json.dumps(result.as_row()))
        return 0
    for key, metric in result.metrics.items():
        low, high = metric.drop_ci95
        print(f"{key:<24} {metric.value:.4f}  original {metric.original:.4f}  "
              f"drop {metric.drop:+.4f} [{low:+.4f}, {high:+.4f}]  {metric.samples} samples")  # fmt: skip
    print("fidelity".ljust(24), "  ".join(f"{key} {value:.4g}" for key, value in result.fidelity.items()))
    print("seconds".ljust(24), f"{result.seconds:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
