"""Train the small networks that ship with onnx-lowrank, on Fashion-MNIST, and export them to ONNX.

It writes a model, `calibration.npz`, `test.npz` and a README that says what they hold to `--out`, by default the
package's assets. The export is a plain one: BatchNormalization stays a node of its own, and the network normalises
its pixels itself. The test images are looked at once, after the last epoch, so the accuracy is a fair one.

    pip install "onnx-lowrank[train]"; apt-get install dataset-fashion-mnist
    python -m benchmarks.train_demo
"""

# torch is no development dependency; without it the base classes are unknown.
# pyright: reportUntypedBaseClass=false

import argparse
import time
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from math import sqrt
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import swa_utils

from benchmarks.fashion_mnist import DATA, Labels, Pixels, load

ASSETS = Path(__file__).resolve().parent.parent / "onnx_lowrank" / "assets"
PIXEL_MEAN, PIXEL_STD = 72.94, 90.02  # of the 60,000 training images, in units of 0..255
CALIBRATION_IMAGES, TEST_IMAGES, BATCH = 512, 2_000, 256

README = """# A small network on Fashion-MNIST, written by `python -m benchmarks.train_demo --arch {arch}`

- `{model}`: input `image` [batch, 1, 28, 28], float32, raw pixels 0..255; output `logits` [batch, 10]
- `calibration.npz`: `image`, 512 unlabelled training images, uint8
- `test.npz`: `image`, `label`, 2,000 labelled test images, uint8 and int64, not used in training
- {facts}

Measured by onnxruntime's CPU provider. Data: Fashion-MNIST, copyright 2017 Zalando SE, MIT licence.
"""


class PixelNorm(nn.Module):
    """Raw pixels to zero mean and unit variance, as the first two nodes of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Buffer(torch.tensor(PIXEL_MEAN))
        self.std = nn.Buffer(torch.tensor(PIXEL_STD))

    def forward(self, image: Tensor) -> Tensor:
        """Normalise `image`, of any shape."""
        return (image - self.mean) / self.std


class ConvNorm(nn.Sequential):
    """Convolution and BatchNorm, without the activation."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)


class Block(nn.Module):
    """Basic residual block (He et al., 2016, https://arxiv.org/abs/1512.03385), 1x1 projection where shapes change."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = ConvNorm(inputs, outputs, stride=stride)
        self.second = ConvNorm(outputs, outputs)
        self.shortcut = nn.Identity() if inputs == outputs else ConvNorm(inputs, outputs, kernel=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, inputs, h, w) to (n, outputs, h / stride, w / stride)."""
        return functional.relu(self.second(functional.relu(self.first(x))) + self.shortcut(x))


def resnet(widths: tuple[int, ...], blocks: tuple[int, ...]) -> nn.Module:
    """Stem, stages of residual blocks (each but the first halves the image), global average pool, classifier."""
    layers = OrderedDict[str, nn.Module](pixels=PixelNorm(), stem=ConvNorm(1, widths[0]), relu=nn.ReLU())
    inputs = widths[0]
    for stage, (width, count) in enumerate(zip(widths, blocks, strict=True), start=1):
        first = Block(inputs, width, stride=1 if stage == 1 else 2)
        layers[f"stage{stage}"] = nn.Sequential(first, *(Block(width, width, stride=1) for _ in range(count - 1)))
        inputs = width
    layers.update(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), classifier=nn.Linear(inputs, 10))
    return nn.Sequential(layers)


def vgg(widths: tuple[int, ...], depths: tuple[int, ...], hidden: int) -> nn.Module:
    """VGG-like (Simonyan and Zisserman, 2015, https://arxiv.org/abs/1409.1556): 3x3 convolutions, pools, two Gemms."""
    layers = OrderedDict[str, nn.Module](pixels=PixelNorm())
    inputs, side = 1, 28
    for stage, (width, count) in enumerate(zip(widths, depths, strict=True), start=1):
        for layer in range(1, count + 1):
            layers |= {f"conv{stage}_{layer}": ConvNorm(inputs, width), f"relu{stage}_{layer}": nn.ReLU()}
            inputs = width
        layers[f"pool{stage}"] = nn.MaxPool2d(2)
        side //= 2
    layers.update(flatten=nn.Flatten(), hidden=nn.Linear(inputs * side * side, hidden), relu=nn.ReLU())
    layers.update(classifier=nn.Linear(hidden, 10))
    return nn.Sequential(layers)


# What to build, and the name of the file it becomes.
ARCHITECTURES = {
    "demo": (partial(resnet, widths=(32, 64, 128), blocks=(2, 2, 1)), "fashion_resnet.onnx"),
    "resnet20": (partial(resnet, widths=(16, 32, 64), blocks=(3, 3, 3)), "fashion_resnet20.onnx"),
    "vgg": (partial(vgg, widths=(32, 64, 128), depths=(2, 2, 3), hidden=128), "fashion_vgg.onnx"),
}


def augmented(images: Pixels, labels: Labels, rng: np.random.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of shuffled batches; each image shifted by up to two pixels and flipped half the time."""
    padded = np.pad(images[:, 0], ((0, 0), (2, 2), (2, 2)))
    crops = np.lib.stride_tricks.sliding_window_view(padded, (28, 28), axis=(1, 2))  # a view (n, 5, 5, 28, 28)
    for chosen in rng.permutation(len(images))[: len(images) // BATCH * BATCH].reshape(-1, BATCH):
        batch = crops[chosen, rng.integers(5, size=BATCH), rng.integers(5, size=BATCH)]
        flipped = np.where(rng.random((BATCH, 1, 1)) < 0.5, batch[:, :, ::-1], batch)
        yield torch.from_numpy(flipped[:, None].astype(np.float32)), torch.from_numpy(labels[chosen])


def train(model: nn.Module, images: Pixels, labels: Labels, epochs: int, seed: int) -> nn.Module:
    """Nesterov SGD under a one-cycle rate with label smoothing, in bfloat16; returns the moving average."""
    rng = np.random.default_rng(seed)
    model.train().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # its overload is missing
    average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.99), use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, steps, pct_start=0.25, cycle_momentum=False)
    for epoch in range(1, epochs + 1):
        began, losses = time.perf_counter(), list[float]()
        for image, label in augmented(images, labels, rng):
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(image)
            loss = functional.cross_entropy(logits.float(), label, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
            losses.append(loss.item())
        rate = len(losses) * BATCH / (time.perf_counter() - began)
        print(f"epoch {epoch:2}/{epochs}  loss {np.mean(losses):.4f}  {rate:.0f} images/s", flush=True)
    return average.module.eval()


def count_macs(model: nn.Module) -> int:
    """Multiply-accumulates of the convolutions and linear layers, for one image."""
    macs = list[int]()

    def note(layer: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        macs.append(output.numel() * layer.get_parameter("weight")[0].numel())

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(note)
    model(torch.zeros(1, 1, 28, 28))
    return sum(macs)


def export(model: nn.Module, path: Path) -> None:
    """Write the ONNX file, with BatchNorm left unfused and in its inference form."""
    # The flag of the outermost module alone changes no node; without it, equal initializers hide behind Identity nodes.
    model.training = True
    torch.onnx.export(
        model,
        (torch.zeros(1, 1, 28, 28),),
        str(path),
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        opset_version=17,
        dynamo=False,
        training=torch.onnx.TrainingMode.PRESERVE,  # EVAL would fuse BatchNorm
        do_constant_folding=False,
    )
    onnx.checker.check_model(str(path), full_check=True)


def hits(path: Path, images: Pixels, labels: Labels) -> npt.NDArray[np.bool_]:
    """Which images the exported file classifies rightly, on onnxruntime's CPU provider."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    batches = np.array_split(images.astype(np.float32), max(1, len(images) // 250))
    logits = np.concatenate([np.asarray(session.run(["logits"], {"image": batch})[0]) for batch in batches])
    return logits.argmax(axis=1) == labels


def proportion(right: npt.NDArray[np.bool_]) -> str:
    """The share of hits with its 95 % Wilson score interval."""
    n, p, z = len(right), float(right.mean()), 1.96
    centre, half = p + z * z / (2 * n), z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
    return f"{p:.4f} (95 % interval {low:.4f} to {high:.4f}, {n:,} images)"


def main() -> None:
    """Train, export, measure, and say what came out."""
    parser = argparse.ArgumentParser(description="Train a small network on Fashion-MNIST and export it to ONNX.")
    parser.add_argument("--arch", choices=sorted(ARCHITECTURES), default="demo", help="network to train")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the four gzipped idx files")
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder to write to")
    for option, default in {"--epochs": 8, "--seed": 0, "--threads": 2}.items():
        parser.add_argument(option, type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    began = time.perf_counter()
    images, labels = load("train", args.data)
    test_images, test_labels = load("t10k", args.data)
    build, name = ARCHITECTURES[args.arch]
    model = train(build(), images, labels, args.epochs, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    export(model, args.out / name)
    picks = np.random.default_rng(args.seed)
    calibration = np.sort(picks.choice(len(images), CALIBRATION_IMAGES, replace=False))
    held = np.sort(picks.choice(len(test_images), TEST_IMAGES, replace=False))
    np.savez_compressed(args.out / "calibration.npz", image=images[calibration])
    np.savez_compressed(args.out / "test.npz", image=test_images[held], label=test_labels[held])

    right = hits(args.out / name, test_images, test_labels)
    facts = [
        f"accuracy: {proportion(right)}; on test.npz {proportion(right[held])}",
        f"size: {sum(p.numel() for p in model.parameters()):,} parameters, {count_macs(model):,} MACs per image",
        *(f"{file}: {(args.out / file).stat().st_size:,} bytes" for file in (name, "calibration.npz", "test.npz")),
    ]
    (args.out / "README.md").write_text(README.format(arch=args.arch, model=name, facts="\n- ".join(facts)))
    print(*facts, f"wall time: {(time.perf_counter() - began) / 60:.1f} min", sep="\n")


if __name__ == "__main__":
    main()
