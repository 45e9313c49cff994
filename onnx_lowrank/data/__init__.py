"""Samples for a model, from every kind of source a user may have."""

from onnx_lowrank.data.dataset import LABEL, SOURCE, Batch, Dataset, Part
from onnx_lowrank.data.reading import read_npz, read_samples

__all__ = ["LABEL", "SOURCE", "Batch", "Dataset", "Part", "read_npz", "read_samples"]
