"""onnx-lowrank: ONNX model in, faster ONNX model out, with proof.

from onnx_lowrank import Settings, Speedup, Target, optimize

report, plan = optimize("model.onnx", "small.onnx", Settings(Speedup(2), Target(threads=1)))
print(report.latency.speedup, report.fidelity["relative_error"])
"""

from onnx_lowrank.errors import (
    GoalNotReachedError,
    InputError,
    InvalidResultError,
    LowRankError,
    PassError,
    ProviderError,
)
from onnx_lowrank.goals import KeepMacs, KeepParams, LatencyMs, MaxDrop, MaxError, Speedup
from onnx_lowrank.inspection import inspect
from onnx_lowrank.pipeline import apply, optimize, plan
from onnx_lowrank.plan import Plan
from onnx_lowrank.profile import profile
from onnx_lowrank.report.model import Report
from onnx_lowrank.settings import Settings
from onnx_lowrank.target import InputShapes, Target
from onnx_lowrank.validation import validate

__all__ = [
    "GoalNotReachedError",
    "InputError",
    "InputShapes",
    "InvalidResultError",
    "KeepMacs",
    "KeepParams",
    "LatencyMs",
    "LowRankError",
    "MaxDrop",
    "MaxError",
    "PassError",
    "Plan",
    "ProviderError",
    "Report",
    "Settings",
    "Speedup",
    "Target",
    "apply",
    "inspect",
    "optimize",
    "plan",
    "profile",
    "validate",
]
