"""One number for how far the outputs of two models are apart, in the metric the user chose; smaller is better.

* relative: relative L2 error over all outputs of real numbers together;
* cosine: 1 - cosine of the angle between original and optimized output, mean over outputs;
* kl: Kullback-Leibler divergence KL(original || optimized) in nats, mean over the outputs it is defined for;
* top1: share of rows whose largest class differs, mean over the outputs with classes;
* worst: relative L2 error of the worst output.

Outputs that differ in shape count as wholly wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from onnx_lowrank.errors import InputError
from onnx_lowrank.fidelity import OutputFidelity

ERROR_METRICS = ("relative", "cosine", "kl", "top1", "worst")


def check_error_metric(name: str) -> str:
    """The name itself.

    Raises:
        InputError: if there is no such metric.
    """
    if name not in ERROR_METRICS:
        raise InputError(f"--error-metric {name}", f"one of {', '.join(ERROR_METRICS)}", "name one of these")
    return name


def error_in(metric: str, outputs: Sequence[OutputFidelity], relative: float) -> float:
    """The error in one of `ERROR_METRICS`.

    Args:
        metric: Its name.
        outputs: Distances per output.
        relative: Relative L2 error of all outputs together, which those per output do not tell.

    Raises:
        InputError: if no output has what the metric needs, or there is no such metric.
    """
    match check_error_metric(metric):
        case "cosine":
            errors = [1.0 - output.cosine for output in outputs]
        case "kl":
            errors = [math.inf if o.shape_mismatches else o.kl for o in outputs if o.kl is not None]
        case "top1":
            errors = [_differing(o, o.top1_agreement) for o in outputs if o.top1_agreement is not None]
        case "worst":
            errors = [max((output.relative for output in outputs), default=0.0)]
        case _:
            errors = [relative]
    if outputs and not errors:
        found = f"--error-metric {metric} for outputs without classes ({', '.join(repr(o.name) for o in outputs)})"
        right = "an output of class probabilities, logits or scores"
        raise InputError(found, right, "choose relative, cosine or worst")
    return float(np.mean(errors)) if errors else 0.0


def _differing(output: OutputFidelity, agreement: float) -> float:
    """Share without agreement, which is that of the samples that were compared."""
    return 1.0 - agreement * (1.0 - output.shape_mismatches / output.samples)
