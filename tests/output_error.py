"""The error that calibrated formats are judged by, as its definition says."""

from __future__ import annotations

import math

import numpy as np

from onnx_lowrank.layer import Array


def output_error(weight: Array, other: Array, gram: Array) -> float:
    """Relative output error sqrt(tr(D G D^T) / tr(M G M^T)) of `other` against `weight`; 0 if there is no output.

    Args:
        weight: Canonical weight (groups, out, in, *kernel), or (groups, out, n).
        other: Of the same size.
        gram: G, (groups, n, n).
    """
    matrix = weight.reshape(*weight.shape[:2], -1)
    difference = matrix - other.reshape(matrix.shape)
    energy = float(np.vdot(matrix @ gram, matrix))
    return math.sqrt(max(0.0, float(np.vdot(difference @ gram, difference))) / energy) if energy > 0 else 0.0
