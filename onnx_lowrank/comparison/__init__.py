"""Formats beside each other, at matched budgets: for every layer, and for the whole network."""

from onnx_lowrank.comparison.compare import compare
from onnx_lowrank.comparison.model import Comparison
from onnx_lowrank.comparison.terminal import render

__all__ = ["Comparison", "compare", "render"]
