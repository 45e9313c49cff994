"""Networks on Fashion-MNIST in the zoo's form: the embedded one, and a ResNet-20 and a VGG-like one of the literature.

    apt-get install dataset-fashion-mnist
    python -m benchmarks.fashion [embedded resnet20 vgg]

writes `<zoo cache>/fashion_<name>/{model.onnx,calibration.npz,evaluation.npz}`: 1,024 unlabelled training images and
all 10,000 labelled test images. The embedded network is the package's. `benchmarks.train_demo` trains the others
(torch, a quarter of an hour each) unless `<user cache>/onnx-lowrank/fashion/<name>` holds them already. Their widths
were fixed before any of them was compressed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from platformdirs import user_cache_path
from typing_extensions import override

from benchmarks.fashion_mnist import load
from benchmarks.zoo.agreement import hits
from benchmarks.zoo.cache import Arrays, default_cache
from benchmarks.zoo.model import LABEL, Outputs, Scores, ZooModel
from benchmarks.zoo.session import Session

ASSETS = Path(__file__).resolve().parent.parent / "onnx_lowrank" / "assets"
EMBEDDED = "embedded"


@dataclass(frozen=True)
class FashionNet(ZooModel):
    """A network of `benchmarks.train_demo`, metric top-1.

    Attributes:
        architecture: As `--arch` names it; `embedded` for the one in the package.
    """

    calibration_samples: ClassVar[int] = 1024

    architecture: str = EMBEDDED

    @override
    def export(self, folders: Sequence[Path], target: Path) -> None:
        trained = ASSETS / "fashion_resnet.onnx"
        if self.architecture != EMBEDDED:
            folder = user_cache_path("onnx-lowrank") / "fashion" / self.architecture
            trained = folder / f"fashion_{self.architecture}.onnx"
            words = ["--arch", self.architecture, "--out", str(folder)]
            if not trained.is_file():
                subprocess.run([sys.executable, "-m", "benchmarks.train_demo", *words], check=True)
        shutil.copyfile(trained, target)

    @override
    def calibration(self, folders: Sequence[Path], original: Path, samples: int) -> Arrays:
        images, _ = load("train")
        return {"image": images[np.random.default_rng(0).permutation(len(images))[:samples]]}

    @override
    def evaluation(self, folders: Sequence[Path], original: Path) -> Arrays:
        images, labels = load("t10k")
        return {"image": images, LABEL: labels}

    @override
    def score(self, outputs: Outputs, reference: Outputs, data: Arrays, folder: Path) -> Scores:
        return {"top1": hits(outputs[0].argmax(1) == data[LABEL])}

    @override
    def run(self, session: Session, data: Arrays) -> list[NDArray[Any]]:
        return session.run({"image": data["image"].astype(np.float32)})


NETS = {
    name: FashionNet(f"fashion_{name}", "image classifier", (), ("image=1x1x28x28",), batch=100, architecture=name)
    for name in (EMBEDDED, "resnet20", "vgg")
}


def main() -> None:
    """Write models and data of the networks named, of all by default."""
    for name in sys.argv[1:] or NETS:
        print(NETS[name].build(default_cache()))


if __name__ == "__main__":
    main()
