"""The demo: a residual network trained on Fashion-MNIST, optimized offline with the samples that ship beside it."""

from __future__ import annotations

import tempfile
from importlib import resources
from pathlib import Path

from onnx_lowrank.goals import Speedup
from onnx_lowrank.pipeline import optimize
from onnx_lowrank.progress import Phases
from onnx_lowrank.report.model import Report
from onnx_lowrank.settings import Settings
from onnx_lowrank.target import InputShapes, Target

BATCH = 8


def run_demo(speedup: float, threads: int, out: Path | None, phases: Phases) -> Report:
    """Optimize the embedded network and measure what it gained and lost.

    Args:
        speedup: The goal.
        threads: 0 for all cores.
        out: Receives the optimized model; None: it is thrown away.
        phases: Timed and shown.
    """
    with resources.as_file(resources.files("onnx_lowrank.assets")) as assets, tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            goal=Speedup(speedup),
            target=Target(threads=threads, shapes=(InputShapes({"image": (BATCH, 1, 28, 28)}),)),
            calibration=assets / "calibration.npz",
            eval=assets / "test.npz",
        )
        report, _ = optimize(assets / "fashion_resnet.onnx", out or Path(folder) / "demo.onnx", settings, phases)
    return report
