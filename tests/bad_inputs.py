"""Everything a user can get wrong on a command line: the table, and what the folders of its cases hold."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from builders import conv_model, model, product_model, value
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

MODEL = Path("model.onnx")
RNG = np.random.default_rng(0)
SEPARATOR = "…"
IMAGE = "P3 2 1 255 1 2 3 4 5 6\n"  # two pixels, as a PPM file in text


@dataclass(frozen=True)
class Case:
    """A command that is refused; the table is `bad_inputs.toml`, what its folders hold stands in `SETUPS`.

    Args:
        name: What is wrong.
        run: Arguments, as in a shell whose working folder holds `model.onnx`.
        says: The whole of standard error after "error: "; an ellipsis stands for anything on that line.
        code: Exit code.
    """

    name: str
    run: str
    says: str
    code: int = 2

    def prepare(self) -> None:
        """Bring the working folder, which holds a good model, into the state in question."""
        SETUPS.get(self.name, lambda: None)()

    @property
    def pattern(self) -> str:
        """A regular expression for the whole of standard error."""
        return ".*".join(map(re.escape, f"error: {self.says}\n".split(SEPARATOR)))


def cases() -> list[Case]:
    """The table."""
    table = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
    return [Case(name, **entry) for name, entry in table.items()]


def good_model() -> ModelProto:
    """x (2, 12) -> y (2, 10) through a Gemm that SVD accepts."""
    return product_model("Gemm", [2, 12], [12, 10])


def _write(change: Callable[[bytes], bytes]) -> Callable[[], object]:
    return lambda: MODEL.write_bytes(change(good_model().SerializeToString()))


def _model(proto: Callable[[], ModelProto]) -> Callable[[], object]:
    return lambda: MODEL.write_bytes(proto().SerializeToString())


def _changed(change: Callable[[ModelProto], object]) -> Callable[[], object]:
    def prepare() -> None:
        proto = good_model()
        change(proto)
        MODEL.write_bytes(proto.SerializeToString())

    return prepare


def _external(location: str, data: str | None = None, size: int = 480) -> Callable[[], object]:
    def prepare() -> None:
        proto = good_model()
        weight = proto.graph.initializer[0]
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value=location)
        MODEL.write_bytes(proto.SerializeToString())
        if data is not None:
            Path(data).write_bytes(bytes(size))

    return prepare


def _symlink_out() -> None:
    Path("elsewhere").mkdir()
    Path("elsewhere/secret").write_bytes(bytes(480))
    Path("sub").mkdir()
    _external("weights")()
    MODEL.rename("sub/model.onnx")
    Path("sub/weights").symlink_to("../elsewhere/secret")


def _weight(change: Callable[[NDArray[np.float32]], NDArray[np.generic]]) -> Callable[[], object]:
    def put(proto: ModelProto) -> None:
        weight = proto.graph.initializer[0]
        array = np.array(numpy_helper.to_array(weight), np.float32)
        weight.CopyFrom(numpy_helper.from_array(change(array), weight.name))

    return _changed(put)


def _with_nan(array: NDArray[np.float32]) -> NDArray[np.float32]:
    array[3, 4] = np.nan
    return array


def _wrong_pads() -> ModelProto:
    proto = conv_model([1, 4, 6, 6], [8, 4, 3, 3])
    proto.graph.node[0].attribute.append(helper.make_attribute("pads", [1, 1]))
    return proto


def _custom_operator() -> ModelProto:
    node = helper.make_node("Frobnicate", ["x"], ["y"], domain="com.example")
    graph = helper.make_graph([node], "g", [value("x", [2, 12])], [value("y", [2, 12])])
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.example", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def _empty_input() -> ModelProto:
    return product_model("Gemm", [0, 12], [12, 10])


def _huge_input() -> ModelProto:
    return model([helper.make_node("Relu", ["x"], ["y"])], [value("x", [1 << 40])], [value("y", [1 << 40])])


def _weightless() -> ModelProto:
    return model([helper.make_node("Relu", ["x"], ["y"])], [value("x", [2, 12])], [value("y", [2, 12])])


def _samples(**arrays: NDArray[np.generic]) -> Callable[[], object]:
    return lambda: np.savez("data.npz", **arrays)  # pyright: ignore[reportArgumentType] - the stub takes allow_pickle for one


def _folder(**files: NDArray[np.generic] | str) -> Callable[[], object]:
    """The folder `data`: arrays as name.npy, texts as they are called, with the last underscore for the dot."""

    def prepare() -> None:
        Path("data").mkdir()
        for name, content in files.items():
            if isinstance(content, str):
                Path("data", ".".join(name.rsplit("_", 1))).write_text(content)
            else:
                np.save(f"data/{name}.npy", content)

    return prepare


def _x(*shape: int) -> NDArray[np.float32]:
    return RNG.standard_normal(shape).astype(np.float32)


def _text(name: str, text: str) -> Callable[[], object]:
    return lambda: Path(name).write_text(text)


def _plan(**changes: object) -> Callable[[], object]:
    """A plan that fits, but for `changes` in its first layer; those in capitals are of the plan itself."""

    def prepare() -> None:
        from onnx_lowrank.graph.io import model_sha256  # noqa: PLC0415 - only here

        layer: dict[str, object] = {"key": "product", "node": "product", "method": "svd", "rank": [2]}
        plan: dict[str, object] = {
            "schema": 1,
            "model_sha256": model_sha256(MODEL),
            "data_sha256": None,
            "versions": {},
            "passes": [],
            "layers": [layer | {key: new for key, new in changes.items() if key.islower()}],
        }
        plan |= {key.lower(): new for key, new in changes.items() if key.isupper()}
        Path("plan.json").write_text(json.dumps(plan))

    return prepare


def _other(proto: Callable[[], ModelProto]) -> Callable[[], object]:
    return lambda: Path("other.onnx").write_bytes(proto().SerializeToString())


def _linked(link: Callable[[str, str], None]) -> Callable[[], object]:
    return lambda: link("model.onnx", "out.onnx")


SETUPS: dict[str, Callable[[], object]] = {
    "onto itself by another path": lambda: Path("sub").mkdir(),
    "empty": _write(lambda _: b""),
    "not ONNX": _write(lambda _: b"# Just some text\n" * 40),
    "truncated": _write(lambda data: data[: len(data) // 2]),
    "other protobuf": _model(lambda: ModelProto(ir_version=8)),
    "invalid graph": _changed(lambda proto: proto.graph.node[0].input.pop(0)),
    "invalid attribute": _model(_wrong_pads),
    "no such name": _changed(lambda proto: proto.graph.initializer.pop(0)),
    "unknown element type": _changed(lambda p: setattr(p.graph.input[0].type.tensor_type, "elem_type", 1000)),
    "old opset": _changed(lambda proto: setattr(proto.opset_import[0], "version", 6)),
    "custom operator": _model(_custom_operator),
    "external data missing": _external("weights"),
    "external data above": _external("../weights"),
    "external data anywhere": _external("/etc/passwd"),
    "external data through a link": _symlink_out,
    "external data short": _external("weights", "weights", 479),
    "result would replace the external data": _external("out.onnx.data", "out.onnx.data"),
    "NaN weight": _weight(_with_nan),
    "short weight": _changed(lambda proto: proto.graph.initializer[0].dims.append(2)),
    "empty input": _model(_empty_input),
    "huge input": _model(_huge_input),
    "data are text": _text("data.npz", "x"),
    "data are .npy": lambda: np.save("data.npy", _x(2, 12)),
    "pickled": _samples(x=np.array([{}, []], object)),
    "wrong name": _samples(image=_x(4, 12)),
    "unknown array": _samples(x=_x(4, 12), z=_x(4)),
    "wrong rank": _samples(x=_x(4)),
    "wrong shape": _samples(x=_x(4, 13)),
    "wrong type": _samples(x=_x(4, 12).astype(str)),
    "no samples": _samples(x=_x(0, 12)),
    "too few samples": _samples(x=_x(1, 12)),
    "NaN samples": _samples(x=np.full((4, 12), np.nan, np.float32)),
    "label count": _samples(x=_x(4, 12), label=np.arange(3)),
    "empty folder of data": _folder(),
    "wrong shape in a folder": _folder(a=_x(12), b=_x(13)),
    "text for an array in a folder": _folder(a_npy="text"),
    "arrays beside images": _folder(a=_x(12), b_ppm=IMAGE),
    "images as they come": _folder(a_ppm=IMAGE),
    "images for a model that takes none": _folder(a_ppm=IMAGE),
    "text for an image": _folder(a_ppm="text"),
    "preprocessing beside images": _folder(a_ppm=IMAGE, preprocess_txt="std=0"),
    "sources that name nothing": _samples(x=_x(4, 12), source=np.ones(4)),
    "source count": _samples(x=_x(4, 12), source=np.arange(3)),
    "error metric without classes": _model(lambda: conv_model([1, 4, 6, 6], [8, 4, 3, 3])),
    "no label": _samples(x=_x(4, 12)),
    "onto a symbolic link to itself": _linked(os.symlink),
    "onto a hard link to itself": _linked(os.link),
    "onto the data": _samples(x=_x(4, 12)),
    "onto the recipe": _text("r.toml", "seed = 1"),
    "apply onto the model": _plan(),
    "recipe not TOML": _text("r.toml", "speedup: 2"),
    "recipe key": _text("r.toml", "speed-up = 2"),
    "recipe value": _text("r.toml", 'speedup = "2"'),
    "recipe goal": _text("r.toml", "speedup = 0.5"),
    "plan not JSON": _text("plan.json", "{"),
    "plan is a list": _text("plan.json", "[]"),
    "plan of tomorrow": _plan(SCHEMA=2),
    "plan for another model": _plan(MODEL_SHA256="0" * 64),
    "plan for other data": _plan(DATA_SHA256="0" * 64),
    "plan with a broken layer": _plan(LAYERS=[{"key": "product"}]),
    "plan with an unknown layer": _plan(key="z"),
    "plan with an unknown method": _plan(method="magic"),
    "plan with an unknown pass": _plan(PASSES=[{"name": "magic", "options": {}}]),
    "plan with rank 0": _plan(rank=[0]),
    "plan with half a rank": _plan(rank=[1.5]),
    "plan with too high a rank": _plan(rank=[11]),
    "plan with too long a rank": _plan(rank=[2, 2]),
    "compare with text": _text("other.onnx", "x" * 99),
    "compare with another model": _other(_weightless),
}
