"""Reading and writing: nothing is lost, nothing is half written, bad files are refused in one line."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import onnx
import platformdirs
import pytest
from builders import differences, everything_model, model, value
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnx_lowrank.errors import InputError
from onnx_lowrank.graph import Graph, check, check_file, load, model_sha256, save
from onnx_lowrank.graph.messages import tensors

ZOO = sorted(Path(platformdirs.user_cache_dir("onnx-lowrank")).glob("zoo/**/*.onnx"))


def matmul_model(size: int = 64) -> ModelProto:
    w = np.random.default_rng(1).standard_normal((size, size)).astype(np.float32)
    shape = np.array([-1, size], np.int64)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], name="m"),
        helper.make_node("Reshape", ["m", "shape"], ["y"]),
    ]
    return model(nodes, [value("x", ["n", size])], [value("y", ["n", size])], {"w": w, "shape": shape})


def write_external(folder: Path, proto: ModelProto | None = None) -> Path:
    """The model with every tensor in weights.bin."""
    path = folder / "model.onnx"
    onnx.save(proto or matmul_model(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def inlined(path: Path) -> ModelProto:
    """The model at `path` with all data inside and no trace of where they were."""
    proto = onnx.load(path)
    for tensor in tensors(proto):
        tensor.ClearField("data_location")
    return proto


def test_round_trip_keeps_every_field(tmp_path: Path) -> None:
    proto = everything_model()
    onnx.save(proto, tmp_path / "in.onnx")
    graph = load(tmp_path / "in.onnx")
    save(graph, tmp_path / "out.onnx")
    written = ModelProto.FromString((tmp_path / "out.onnx").read_bytes())
    assert differences(proto, written) == []
    assert (tmp_path / "in.onnx").read_bytes() == (tmp_path / "out.onnx").read_bytes()


def test_differences_sees_each_kind_of_field() -> None:
    ours, theirs = everything_model(), everything_model()
    theirs.graph.node[2].metadata_props[0].value = "lost"
    theirs.graph.node[2].attribute.add(name="extra")
    theirs.graph.node[5].attribute[0].g.MergeFromString(b"\x80\x7d\x06")
    theirs.ClearField("doc_string")
    assert differences(ours, theirs) == [
        "model.doc_string only in the first",
        "model.graph.node[2].attribute only in the second",
        "model.graph.node[2].metadata_props[0].value",
        "model.graph.node[5].attribute[0].g: unknown fields",
    ]


@pytest.mark.zoo
@pytest.mark.skipif(not ZOO, reason="no zoo model has been fetched")
@pytest.mark.parametrize("path", ZOO, ids=lambda path: "/".join(path.parts[-2:]))
def test_round_trip_of_zoo_model_keeps_every_field(path: Path, tmp_path: Path) -> None:
    graph = load(path)
    check(graph)
    save(graph, tmp_path / "out.onnx")
    check_file(tmp_path / "out.onnx", graph.tolerated)
    assert differences(onnx.load(path), onnx.load(tmp_path / "out.onnx")) == []


def test_message_given_to_graph_is_not_edited() -> None:
    proto = everything_model()
    before = proto.SerializeToString()
    graph = Graph(proto)
    for scope in graph.scopes():
        for node in scope.nodes:
            node.input[:] = ["other"]
            scope.initializers.clear()
    graph.prune()
    assert proto.SerializeToString() == before


def test_external_data_stay_external_and_equal(tmp_path: Path) -> None:
    source = write_external(tmp_path)
    graph = load(source)
    (tmp_path / "out").mkdir()
    save(graph, tmp_path / "out" / "small.onnx")
    written = onnx.load(tmp_path / "out" / "small.onnx", load_external_data=False)
    entries = {entry.key: entry.value for entry in written.graph.initializer[0].external_data}
    assert entries == {"location": "small.onnx.data", "offset": "0", "length": "16384"}
    assert written.graph.initializer[1].data_location == TensorProto.DEFAULT  # below 1 KiB
    assert differences(inlined(source), inlined(tmp_path / "out" / "small.onnx")) == []
    check_file(tmp_path / "out" / "small.onnx")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"small.onnx", "small.onnx.data"}


def test_external_constant_nodes_and_bodies_are_stored_too(tmp_path: Path) -> None:
    proto = everything_model()
    source = write_external(tmp_path, proto)
    graph = load(source)
    check(graph)
    (tmp_path / "weights.bin.data").touch()
    save(graph, tmp_path / "other.onnx")
    assert differences(inlined(source), inlined(tmp_path / "other.onnx")) == []
    (tmp_path / "weights.bin").unlink()
    load(tmp_path / "other.onnx")


def test_new_weights_go_to_the_data_file(tmp_path: Path) -> None:
    graph = load(write_external(tmp_path))
    factor = np.random.default_rng(2).standard_normal((64, 64)).astype(np.float32)
    graph.main.initializers["w"] = numpy_helper.from_array(factor, "w")
    save(graph, tmp_path / "out.onnx")
    again = load(tmp_path / "out.onnx")
    assert again.external
    np.testing.assert_array_equal(again.main.array("w"), factor)


def test_saving_twice_gives_equal_bytes(tmp_path: Path) -> None:
    for name, source in (("inline", tmp_path / "inline.onnx"), ("external", write_external(tmp_path))):
        onnx.save(matmul_model(), tmp_path / "inline.onnx")
        written: list[dict[str, bytes]] = []
        for folder in (tmp_path / f"{name}1", tmp_path / f"{name}2"):
            folder.mkdir()
            save(load(source), folder / "out.onnx")
            written.append({p.name: p.read_bytes() for p in folder.iterdir()})
        assert written[0] == written[1]


def test_hash_covers_external_data(tmp_path: Path) -> None:
    path = write_external(tmp_path)
    before = model_sha256(path)
    assert before == model_sha256(path)
    data = bytearray((tmp_path / "weights.bin").read_bytes())
    data[5] ^= 1
    (tmp_path / "weights.bin").write_bytes(data)
    assert model_sha256(path) != before


def test_output_must_not_replace_weights_being_read(tmp_path: Path) -> None:
    onnx.save(matmul_model(), tmp_path / "a.onnx", save_as_external_data=True, location="b.onnx.data", size_threshold=0)
    before = (tmp_path / "b.onnx.data").read_bytes()
    with pytest.raises(InputError, match="whose weights would replace"):
        save(load(tmp_path / "a.onnx"), tmp_path / "b.onnx")
    assert (tmp_path / "b.onnx.data").read_bytes() == before
    assert not (tmp_path / "b.onnx").exists()


@pytest.mark.parametrize("external", [False, True])
def test_full_disk_leaves_what_was_there(tmp_path: Path, external: bool) -> None:
    path = write_external(tmp_path) if external else tmp_path / "model.onnx"
    onnx.save(matmul_model(), path) if not external else None
    graph = load(path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "small.onnx").write_bytes(b"before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(InputError) as caught:
            save(graph, out / "small.onnx")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    target = out / "small.onnx"
    assert str(caught.value) == (
        f"got {target}, which cannot be written (File too large); expected a writable file; check path and space"
    )
    assert [(p.name, p.read_bytes()) for p in out.iterdir()] == [("small.onnx", b"before")]


def test_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = load(write_external(tmp_path))
    out = tmp_path / "out"
    out.mkdir()

    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(graph, out / "small.onnx")
    assert list(out.iterdir()) == []


def test_unwritable_places(tmp_path: Path) -> None:
    graph = Graph(matmul_model())
    with pytest.raises(InputError, match="a directory; expected a file name"):
        save(graph, tmp_path)
    with pytest.raises(InputError, match=r"cannot be written \(No such file or directory\)"):
        save(graph, tmp_path / "missing" / "m.onnx")


BAD = """missing, directory, empty, text, truncated, no graph, old opset, short tensor, negative dimension, duplicate,
unknown type, dangling name, too many inputs, not UTF-8""".replace("\n", " ").split(", ")


def bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Case -> file, and the message with the file's name in place of {}."""

    def write(name: str, data: bytes) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    good = matmul_model()
    old, shape, twice, nameless, kind, arity, negative = (
        ModelProto.FromString(good.SerializeToString()) for _ in range(7)
    )
    old.opset_import[0].version = 6
    shape.graph.initializer[0].raw_data = b"1234"
    twice.graph.initializer.append(twice.graph.initializer[0])
    nameless.graph.node[0].input[1] = "nothing"
    kind.graph.initializer[0].data_type = 99
    arity.graph.node[0].input.append("x")
    negative.graph.initializer[0].dims[0] = -64
    again = "export the model again"
    expects = "expected one the ONNX checker accepts; export it again"
    return {
        "missing": (folder / "no.onnx", "got {}, which does not exist; expected an ONNX file; check the path"),
        "directory": (folder, "got {}, a directory; expected an ONNX file; name the file in it"),
        "empty": (write("empty", b""), f"got {{}} of 0 bytes; expected between 1 byte and 2 GB; {again}"),
        "text": (
            write("text", b"hello, this is no protobuf"),
            "got {}, which is truncated or not ONNX; expected an ONNX model; export or copy it again",
        ),
        "truncated": (
            write("truncated", good.SerializeToString()[:-40]),
            "got {}, which is truncated or not ONNX; expected an ONNX model; export or copy it again",
        ),
        "no graph": (
            write("no graph", ModelProto(ir_version=8).SerializeToString()),
            "got {}, which holds no graph; expected an ONNX model; check which file this is",
        ),
        "old opset": (
            write("old", old.SerializeToString()),
            "got {} with operator set 6; expected 7 or newer; convert it with onnx.version_converter",
        ),
        "short tensor": (
            write("shape", shape.SerializeToString()),
            f"got tensor 'w' of element type 1 and shape [64, 64] with 4 bytes; expected 16384 bytes; {again}",
        ),
        "negative dimension": (
            write("negative", negative.SerializeToString()),
            f"got tensor 'w' of element type 1 and shape [-64, 64] with 16384 bytes; expected -16384 bytes; {again}",
        ),
        "duplicate": (
            write("twice", twice.SerializeToString()),
            f"got two initializers called 'w'; expected names used once; {again}",
        ),
        "unknown type": (
            write("kind", kind.SerializeToString()),
            "got tensor 'w' of element type 99 and shape [64, 64]; expected a type this onnx release knows; "
            f"update onnx or {again}",
        ),
        "dangling name": (
            write("nameless", nameless.SerializeToString()),
            "got {}, an invalid model (Nodes in a graph must be topologically sorted, *); " + expects,
        ),
        "not UTF-8": (
            write("latin", good.SerializeToString().replace(b"Reshape", b"Resh\xffpe")),
            f"got {{}} with text that is not UTF-8 in model.graph.node.op_type; expected UTF-8; {again}",
        ),
        "too many inputs": (
            write("arity", arity.SerializeToString()),
            "got {}, an invalid model (*has input size 3 not in range [min=2, max=2].); " + expects,
        ),
    }


@pytest.mark.parametrize("case", BAD)
def test_bad_file_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    path, message = bad_files(tmp_path)[case]
    with pytest.raises(InputError) as caught:
        load(path)
    head, _, tail = message.replace("{}", str(path)).partition("*")  # for the checker's own words
    assert str(caught.value).startswith(head)
    assert str(caught.value).endswith(tail)
    assert "*" in message or str(caught.value) == head


def test_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx.save(matmul_model(), tmp_path / "m.onnx")

    def denied(_: Path) -> bytes:  # chmod would not stop root
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(InputError, match=r"which cannot be read \(Permission denied\); expected a readable file"):
        load(tmp_path / "m.onnx")
