"""Does the provider a plan was made for matter: plans for onnxruntime's CPU provider and for OpenVINO, swapped.

python -m benchmarks.two_providers MODEL --openvino PYTHON [--goal max-error=0.1] [--calibration DATA.npz] [--shape ...]

The model is optimized for both providers at the same goal. Each plan is realised, and the original and both results
are timed in turns on both providers: a table of two plans by two providers. Beside it stand both latency tables, layer
by layer, and the error of each plan: two plans are rivals only where they damage the outputs alike. PYTHON is the
interpreter of an environment with onnxruntime-openvino (`make openvino`); the CPU provider is the one of the
interpreter that runs this.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "two_providers.json"
MISSED = 3  # exit code of a goal that was not reached: the best found is written all the same


@dataclass(frozen=True)
class Place:
    """A provider, and the interpreter whose onnxruntime has it."""

    provider: str
    python: str
    threads: int

    def run(self, *arguments: str | Path) -> str:
        """What an onnx-lowrank command prints."""
        command = [self.python, "-m", "onnx_lowrank", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
        if done.returncode not in {0, MISSED}:
            raise SystemExit(f"{' '.join(command)}: {done.stderr}")
        return done.stdout

    @property
    def options(self) -> tuple[str, ...]:
        """Of the command line."""
        return "--provider", self.provider, "--threads", str(self.threads)


def measure(model: Path, places: list[Place], asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Optimize everywhere, realise every plan, time every result everywhere."""
    shapes = [word for shape in asked.shape for word in ("--shape", shape)]
    samples = ["--calibration", asked.calibration] if asked.calibration else []
    kind, _, value = asked.goal.partition("=")
    reports: dict[str, Any] = {}
    results: list[Path] = []
    for place in places:
        plan, out = folder / f"{place.provider}.json", folder / f"{place.provider}.onnx"
        goal = [f"--{kind}", value, "--time-limit", str(asked.time_limit)]
        written = ["-o", folder / "unused.onnx", "--plan-out", plan, "--json"]
        reports[place.provider] = json.loads(
            place.run("optimize", model, *goal, *shapes, *samples, *place.options, *written)
        )
        # By the other one: a plan is numbers only, and where it is realised must not matter.
        next(other for other in places if other is not place).run("apply", model, plan, "-o", out, *samples)
        results.append(out)
    timed = ["--seconds", str(asked.seconds), "--json"]
    profiles = {
        place.provider: json.loads(place.run("profile", model, *results, *shapes, *place.options, *timed))
        for place in places
    }
    swapped = {
        place.provider: json.loads(
            place.run("profile", *(r for r in results if r.stem != place.provider), folder / f"{place.provider}.onnx",
                      *shapes, *place.options, *timed))
        for place in places
    }  # fmt: skip
    return {
        "model": "/".join(model.parts[-2:]),
        "goal": asked.goal,
        "calibration": next(iter(reports.values()))["calibration"],
        "threads": places[0].threads,
        "environment": {name: report["environment"] for name, report in reports.items()},
        "reached": {name: report["goal"]["reached"] for name, report in reports.items()},
        "relative_error": {name: report["fidelity"]["relative_error"] for name, report in reports.items()},
        "layers": _layers(reports),
        "speedups": {
            place.provider: {
                plan.provider: _row(profiles[place.provider]["models"][1 + index]) for index, plan in enumerate(places)
            }
            for place in places
        },
        "original_ms": {name: found["models"][0]["p50_ms"] for name, found in profiles.items()},
        "own_plan_over_other": {name: _row(found["models"][1]) for name, found in swapped.items()},
        "clock": {name: found["clock"] for name, found in profiles.items()},
        "disturbed": {name: found["disturbed"] for name, found in profiles.items()},
    }


def _row(entry: dict[str, Any]) -> dict[str, Any]:
    return {"ms": entry["p50_ms"], "ratio": entry["ratio"], "ci95": entry["ratio_ci95"]}


def _layers(reports: dict[str, Any]) -> list[dict[str, Any]]:
    """Both latency tables as far as they were decided by: every layer, and the chain it became, on each provider."""
    rows: dict[str, dict[str, Any]] = {}
    for provider, report in reports.items():
        for layer in report["layers"]:
            row = rows.setdefault(layer["name"], {"name": layer["name"], "shape": layer["shape"]})
            row[provider] = {
                "layer_ms": layer["latency_ms_before"],
                "method": layer["method"],
                "rank": layer["rank"],
                "chain_ms": layer["latency_ms_after"],
            }
    return list(rows.values())


def show(found: dict[str, Any], providers: list[str]) -> None:
    """Print the two tables and the table of two by two."""
    print(f"{found['model']}, {found['goal']}, {found['threads']} thread(s); layers and their chains, ms")
    for row in found["layers"]:
        cells = " | ".join(_cell(row[name]) for name in providers if name in row)
        print(f"{row['name'][-34:]:34s} {row['shape']:16s} | {cells}")
    print(f"\nspeedup of the plan for ...{'':14s}" + "".join(f"{name:>28s}" for name in providers))
    for name in providers:
        cells = "".join(f"{_ratio(found['speedups'][name][plan]):>28s}" for plan in providers)
        print(f"  timed on {name:12s} {found['original_ms'][name]:8.3f} ms      {cells}")
    errors = "".join(f"{found['relative_error'][plan]:>28.3g}" for plan in providers)
    print(f"  relative error of the outputs        {errors}")
    for name in providers:
        row = found["own_plan_over_other"][name]
        low, high = row["ci95"]
        verdict = "faster" if low > 1 else "slower" if high < 1 else "as fast"
        print(f"  on {name}, its own plan against the other one: {_ratio(row)}: {verdict} at home")


def _cell(entry: dict[str, Any]) -> str:
    if entry["layer_ms"] is None:
        return f"{'':38s}"
    became = f"{entry['method']} {'x'.join(map(str, entry['rank']))}".strip()
    return f"{entry['layer_ms']:7.3f} -> {entry['chain_ms']:7.3f} {became:20s}"


def _ratio(row: dict[str, Any]) -> str:
    return f"{row['ratio']:.2f}x [{row['ci95'][0]:.2f}, {row['ci95'][1]:.2f}]"


def main() -> None:
    """Measure one model and add it to the recorded results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--openvino", required=True, help="interpreter of an environment with onnxruntime-openvino")
    parser.add_argument("--goal", default="max-error=0.1", help="(%(default)s: plans are rivals at the same damage)")
    parser.add_argument("--calibration", help="samples, as `optimize` takes them")
    parser.add_argument("--shape", action="append", default=[])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--time-limit", type=float, default=300.0)
    parser.add_argument("--seconds", type=float, default=20.0)
    asked = parser.parse_args()
    places = [Place("cpu", sys.executable, asked.threads), Place("openvino", asked.openvino, asked.threads)]
    with tempfile.TemporaryDirectory(prefix="two-providers-") as folder:
        found = measure(asked.model, places, asked, Path(folder))
    show(found, [place.provider for place in places])
    recorded = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    recorded[f"{found['model']} {found['goal']}, {found['threads']} thread(s), {found['calibration']}"] = found
    RESULTS.write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    main()
