"""The task metric of a model on labelled data, sample by sample, so that two models can be compared in pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.batching import safe_batch
from onnx_lowrank.data import Dataset
from onnx_lowrank.errors import InputError, NonFiniteResultError
from onnx_lowrank.metrics import Scores, metric_named
from onnx_lowrank.runtime import open_session
from onnx_lowrank.target import Target

AT_ONCE = 32


def evaluate(
    model: Path,
    dataset: Dataset,
    metric: str,
    target: Target,
    *,
    output: str | None = None,
    batch: int | None = None,
) -> Scores:
    """Scores of `metric` for every sample, in order, at the target's first optimization level.

    Args:
        model: File of the model.
        dataset: Samples with labels.
        metric: A key of `metrics.METRICS`, or `module:function`.
        target: Where to run.
        output: The output that is scored, the first by default; a function of the user's gets them all.
        batch: Samples per run where the model leaves it open; by default as many as it takes, up to 32.

    Raises:
        InputError: without labels, for an unknown metric or output, or if the labels do not fit it.
        NonFiniteResultError: if a score is NaN or infinite, as the outputs are.
    """
    score = metric_named(metric, output)
    session = open_session(model, target, target.levels[0])
    names = [spec.name for spec in session.signature.outputs]
    if output is not None and output not in names:
        raise InputError(f"unknown output {output!r}", f"one of {', '.join(map(repr, names))}", "name one of these")
    size = batch or safe_batch(model, dataset, target, AT_ONCE)
    scores: list[Scores] = []
    for fed in dataset.batches(size):
        if fed.labels is None:
            raise InputError("data without labels", "an array 'label'", f"add labels, or leave out --metric {metric}")
        outputs = session.run(fed.feeds)
        by_sample = {name: _per_sample(array, len(fed.rows)) for name, array in outputs.items() if _is_array(array)}
        scores.append(score(by_sample, fed.labels))
    found = np.concatenate(scores)
    if broken := np.count_nonzero(~np.isfinite(found)):
        raise NonFiniteResultError(
            f"{broken} of {len(found)} samples with NaN or infinite {metric}, in outputs of {model.name}",
            "outputs that can be scored",
            "use a smaller goal",
        )
    return found


def evaluate_original(model: Path, dataset: Dataset, metric: str, target: Target) -> Scores:
    """`evaluate` for the model that others are measured by.

    Raises:
        InputError: likewise, and if a score is NaN or infinite.
    """
    try:
        return evaluate(model, dataset, metric, target)
    except NonFiniteResultError as error:
        do = "leave those samples out, or choose another --metric"
        raise InputError(f"{error.got}, the original", error.expected, do) from error


def _is_array(output: object) -> bool:
    return isinstance(output, np.ndarray)  # sequences and maps have nothing per sample


def _per_sample(output: NDArray[np.generic], count: int) -> NDArray[np.generic]:
    """(samples, ...): an output without a batch axis belongs to the one sample fed."""
    return output[None] if count == 1 and output.shape[:1] != (1,) else output
