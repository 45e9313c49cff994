"""The first tensor at which two models part is named, from the two files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builders import model, value
from onnx import ModelProto, TensorProto, helper

from onnx_lowrank.cli import run
from onnx_lowrank.data import read_npz
from onnx_lowrank.divergence import first_divergence
from onnx_lowrank.errors import InputError
from onnx_lowrank.graph import Graph, save
from onnx_lowrank.passes.factor import Factor
from onnx_lowrank.plan import Choice, Plan
from onnx_lowrank.signature import signature_of
from onnx_lowrank.target import Target

ONE = Target(threads=1)
DEPTH, SIZE = 5, 24
FULL = (SIZE,)


def stack(ir_version: int = 10, elem_type: int = TensorProto.FLOAT) -> ModelProto:
    """DEPTH layers "a" to "e" of x -> Relu(x W), each followed by a Relu."""
    rng = np.random.default_rng(0)
    weights, nodes = {}, []
    for i, name in enumerate("abcde"):
        dtype = helper.tensor_dtype_to_np_dtype(elem_type)
        weights[f"w{i}"] = (rng.standard_normal((SIZE, SIZE)) / np.sqrt(SIZE / 2)).astype(dtype)
        nodes.append(helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"m{i}"], name=name))
        nodes.append(helper.make_node("Relu", [f"m{i}"], [f"x{i + 1}"], name=f"relu_{name}"))
    ends = [value(name, ["n", SIZE], elem_type) for name in ("x0", f"x{DEPTH}")]
    return model(nodes, ends[:1], ends[1:], weights, opset=22, ir_version=ir_version)


def pair(folder: Path, ranks: dict[str, int], *, external: bool = False, **options: Any) -> tuple[Path, Path]:
    """`stack` and the same with svd at the ranks given per layer."""
    original, optimized = folder / "a.onnx", folder / "b.onnx"
    onnx.save(stack(**options), original, save_as_external_data=external, location="a.weights", size_threshold=0)
    graph = Graph(onnx.load(original, load_external_data=False), folder, external=external)
    Factor(Plan("0" * 64, tuple(Choice(name, name, "svd", (rank,)) for name, rank in ranks.items()))).run(graph)
    save(graph, optimized)
    return original, optimized


@pytest.mark.parametrize("options", [{}, {"external": True}, {"ir_version": 8}])
def test_the_layer_that_was_cut_hard_is_named(tmp_path: Path, options: dict[str, Any]) -> None:
    files = pair(tmp_path, {"a": SIZE, "c": 3, "d": SIZE}, **options)
    found = first_divergence(*files, ONE)
    assert found.first is not None
    assert (found.first.tensor, found.first.node, found.first.rewrite) == ("m2", "c/svd_1", "svd at rank 3")
    assert [entry.tensor for entry in found.tensors] == ["m0", "m2", "m3"]
    assert found.tensors[0].error < 1e-5
    assert str(found) == (
        f"first beyond 0.01: c/svd_1 (svd at rank 3), relative error {found.first.error:.3g} in tensor 'm2', "
        f"{found.tensors[0].error:.3g} at the one before; 3 tensors compared on 8 synthetic samples"
    )


def test_its_error_is_that_of_numpy_on_given_data(tmp_path: Path) -> None:
    files = pair(tmp_path, {"a": 5})
    x = np.random.default_rng(1).standard_normal((7, SIZE)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x0=x)
    data = read_npz(tmp_path / "d.npz", signature_of(stack()).inputs)
    found = first_divergence(*files, ONE, data, tolerance=0.3)
    weight = onnx.numpy_helper.to_array(stack().graph.initializer[0]).astype(np.float64)
    u, s, v = np.linalg.svd(weight)
    cut = x @ weight - x @ (u[:, :5] * s[:5]) @ v[:5]
    assert found.first is not None
    assert found.first.error == pytest.approx(np.linalg.norm(cut) / np.linalg.norm(x @ weight), rel=1e-4)
    assert (found.samples, found.data) == (7, "held-out")


def test_no_tensor_beyond_the_tolerance(tmp_path: Path) -> None:
    found = first_divergence(*pair(tmp_path, {"a": SIZE, "b": SIZE}), ONE, tolerance=1e-4)
    assert found.first is None
    assert str(found).startswith("no tensor differs by more than 0.0001 (largest error ")


def test_a_file_that_is_not_ours_is_compared_at_every_common_tensor(tmp_path: Path) -> None:
    original, changed = tmp_path / "a.onnx", tmp_path / "b.onnx"
    onnx.save(stack(), original)
    proto = stack()
    weight = proto.graph.initializer[3]
    weight.CopyFrom(onnx.numpy_helper.from_array(np.full((SIZE, SIZE), np.nan, np.float32), weight.name))
    onnx.save(proto, changed)
    found = first_divergence(original, changed, ONE)
    assert found.first is not None
    assert (found.first.tensor, found.first.node, found.first.rewrite) == ("m3", "d", "MatMul")
    assert "values no longer finite" in str(found)
    assert len(found.tensors) == 2 * DEPTH


def test_models_too_large_to_be_open_together_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = pair(tmp_path, {"a": 20, "c": 3})
    together = first_divergence(*files, ONE)
    monkeypatch.setattr("onnx_lowrank.side_by_side.LARGE_BYTES", 0)
    for held in (1, 1000, 1 << 20):  # one batch at a time, a few, all of them
        monkeypatch.setattr("onnx_lowrank.side_by_side.HELD_BYTES", held)
        assert first_divergence(*files, ONE) == together


def test_types_without_kernels_are_run_with_the_reference(tmp_path: Path) -> None:
    found = first_divergence(*pair(tmp_path, {"b": 2}, elem_type=TensorProto.BFLOAT16), ONE)
    assert found.first is not None
    assert found.first.tensor == "m1"


def test_models_with_nothing_in_common(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.onnx", "b.onnx")]
    for path, name in zip(paths, "yz", strict=True):
        onnx.save(model([helper.make_node("Relu", ["x"], [name])], [value("x", [2])], [value(name, [2])]), path)
    with pytest.raises(InputError) as caught:
        first_divergence(paths[0], paths[1], ONE)
    assert str(caught.value) == (
        f"got {paths[1]} without a tensor of {paths[0]}; expected a version of that model; compare others"
    )


def test_validate_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(path) for path in pair(tmp_path, {"b": 2, "c": 3})]
    assert run(["validate", *files, "--bisect", "--threads", "1"]) == 0
    assert "first beyond 0.01: b/svd_1 (svd at rank 2), relative error " in capsys.readouterr().out
    assert run(["validate", *files, "--bisect", "--json", "--threads", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["bisect"]["first"]["tensor"] == "m1"
    assert run(["validate", *files, "--bisect", "--max-error", "0.001", "--threads", "1"]) == 4
    assert "first beyond 0.001: b/svd_1" in capsys.readouterr().out
