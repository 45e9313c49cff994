"""CREPE, a pitch tracker on raw audio: six convolutions, one linear layer (Kim et al., ICASSP 2018).

Attribute names repeat those of the published weights.
"""

# torch is an optional extra:
# pyright: reportUntypedBaseClass=false

from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.zoo.networks.export import export_traced

CHANNELS = {"tiny": (128, 16, 16, 16, 32, 64), "full": (1024, 128, 128, 128, 256, 512)}
BINS = 360


class Crepe(nn.Module):
    """Frames (batch, 1024) at 16 kHz -> probability of 360 pitches, 20 cents apart."""

    def __init__(self, capacity: str) -> None:
        super().__init__()
        before = 1
        for index, after in enumerate(CHANNELS[capacity], start=1):
            kernel, stride = ((512, 1), (4, 1)) if index == 1 else ((64, 1), (1, 1))
            self.add_module(f"conv{index}", nn.Conv2d(before, after, kernel, stride))
            self.add_module(f"conv{index}_BN", nn.BatchNorm2d(after, eps=1e-3))
            before = after
        self.classifier = nn.Linear(4 * before, BINS)

    def forward(self, frames: Tensor) -> Tensor:
        """(batch, 1024) -> (batch, 360)."""
        x = frames[:, None, :, None]
        for index in range(1, 7):
            padding = (0, 0, 254, 254) if index == 1 else (0, 0, 31, 32)
            x = self.get_submodule(f"conv{index}")(nn.functional.pad(x, padding)).relu()
            x = nn.functional.max_pool2d(self.get_submodule(f"conv{index}_BN")(x), (2, 1), (2, 1))
        return torch.sigmoid(self.classifier(x.permute(0, 2, 1, 3).flatten(1)))


def export(capacity: str, weights: Path, frame: int, target: Path) -> None:
    """Write the network as ONNX with published weights, BatchNorm unfused."""
    tracker = Crepe(capacity)
    tracker.load_state_dict(torch.load(weights, weights_only=True))
    export_traced(
        tracker,
        (torch.zeros(2, frame),),
        target,
        inputs=("frames",),
        outputs=("pitch",),
        dynamic={"frames": {0: "batch"}, "pitch": {0: "batch"}},
        keep_batch_norm=True,
    )
