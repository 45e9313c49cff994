"""Export from torch by tracing, at one opset for the whole zoo."""

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

OPSET = 17


def export_traced(
    module: torch.nn.Module,
    example: tuple[torch.Tensor, ...],
    target: Path,
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    dynamic: Mapping[str, Mapping[int, str]],
    keep_batch_norm: bool = False,
) -> None:
    """Write the module as ONNX.

    Args:
        module: Network; exported in evaluation mode.
        example: Inputs to trace with.
        target: File to write.
        inputs: Names of the graph inputs.
        outputs: Names of the graph outputs.
        dynamic: Tensor name -> axis -> name of the free dimension.
        keep_batch_norm: Leave BatchNorm unfused, as many files found in the wild have it.
    """
    mode = torch.onnx.TrainingMode.PRESERVE if keep_batch_norm else torch.onnx.TrainingMode.EVAL
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracing exporter announces its own retirement
        torch.onnx.export(
            module.eval(),
            example,
            str(target),
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes={name: dict(axes) for name, axes in dynamic.items()},
            opset_version=OPSET,
            training=mode,
            dynamo=False,
        )
