"""Latency benchmarking: model files timed against each other, over threads, batches and optimization levels."""

from onnx_lowrank.profile.benchmark import profile
from onnx_lowrank.profile.model import Comparison, Failure, ModelProfile, Profile
from onnx_lowrank.profile.sweep import Sweep
from onnx_lowrank.profile.terminal import render

__all__ = ["Comparison", "Failure", "ModelProfile", "Profile", "Sweep", "profile", "render"]
