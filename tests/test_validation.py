"""Two files compared on onnxruntime: equal ones, near ones, and every way the second may be invalid."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import model, value
from onnx import ModelProto, TensorProto, helper, numpy_helper
from rich.console import Console

from onnx_lowrank.accuracy import evaluate, evaluate_original
from onnx_lowrank.data import read_npz, read_samples
from onnx_lowrank.errors import InputError, InvalidResultError, NonFiniteResultError
from onnx_lowrank.signature import signature_of
from onnx_lowrank.target import InputShapes, Target
from onnx_lowrank.validation import compare, render, validate

TARGET = Target(threads=1)
WEIGHT = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)


def classifier(weight: np.ndarray = WEIGHT, batch: int | str = "N", dtype: int = TensorProto.FLOAT) -> ModelProto:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["logits"]), helper.make_node("Softmax", ["logits"], ["p"], axis=1)]
    outputs = [value("p", [batch, 4], dtype), value("logits", [batch, 4], dtype)]
    return model(nodes, [value("x", [batch, 6], dtype)], outputs, {"w": weight})


def save(folder: Path, name: str, proto: ModelProto) -> Path:
    path = folder / name
    onnx.save(proto, path)
    return path


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return save(tmp_path, "a.onnx", classifier())


def samples(folder: Path, count: int = 9) -> Path:
    x = np.random.default_rng(1).standard_normal((count, 6)).astype(np.float32)
    path = folder / "d.npz"
    np.savez(path, x=x, label=(x @ WEIGHT).argmax(1))
    return path


def test_a_model_equals_itself_on_synthetic_inputs(original: Path) -> None:
    found = validate(original, original, TARGET, max_error=1e-9)
    assert (found.data, found.engine, found.samples, found.relative_error) == ("synthetic", "onnxruntime", 8, 0.0)
    assert [output.kind for output in found.outputs] == ["probabilities", "logits"]
    assert found.notes == ("input 'x' float Nx6 is taken as 1x6; set it with --shape x=1x6",)
    assert json.loads(json.dumps(found.to_dict()))["outputs"][0]["top1_agreement"] == 1.0


def test_the_error_on_given_data_is_that_of_numpy(original: Path, tmp_path: Path) -> None:
    other = WEIGHT + 0.01 * np.random.default_rng(2).standard_normal(WEIGHT.shape).astype(np.float32)
    optimized = save(tmp_path, "b.onnx", classifier(other))
    data = read_npz(samples(tmp_path), signature_of(classifier()).inputs)
    found = compare(original, optimized, TARGET, data)
    x = data.parts[0].arrays["x"].astype(np.float64)
    expected = np.linalg.norm(x @ (other - WEIGHT)) / np.linalg.norm(x @ WEIGHT)
    assert (found.data, found.samples) == ("held-out", 9)
    assert found.outputs[1].relative == pytest.approx(expected, rel=1e-4)


def test_the_target_decides_the_shapes_of_synthetic_inputs(original: Path) -> None:
    target = Target(threads=1, shapes=(InputShapes({"x": (3, 6)}), InputShapes({"x": (5, 6)})))
    found = compare(original, original, target)
    assert (found.samples, found.notes) == (4 * 3 + 4 * 5, ())


def test_a_stated_limit_that_is_missed(original: Path, tmp_path: Path) -> None:
    optimized = save(tmp_path, "b.onnx", classifier(WEIGHT * 2))
    found = compare(original, optimized, TARGET, max_error=0.1)
    with pytest.raises(InvalidResultError) as caught:
        validate(original, optimized, TARGET, max_error=0.1)
    assert caught.value.exit_code == 4
    assert str(caught.value) == (
        f"got relative error {found.relative_error:.3g} on synthetic data; the worst output is 'logits'; "
        "expected at most 0.1; use a smaller goal, or keep sensitive layers with --keep"
    )


def test_divergence_without_a_limit_is_no_failure(original: Path, tmp_path: Path) -> None:
    assert validate(original, save(tmp_path, "b.onnx", classifier(WEIGHT * 2)), TARGET).relative_error > 0.1


def test_outputs_that_are_no_longer_finite(original: Path, tmp_path: Path) -> None:
    broken = WEIGHT.copy()
    broken[0] = np.inf
    optimized = save(tmp_path, "b.onnx", classifier(broken))
    with pytest.raises(
        InvalidResultError, match=r"got \d+ NaN or infinite values in output 'p' of .*b\.onnx; expected"
    ):
        validate(original, optimized, TARGET)


def test_a_changed_signature(original: Path, tmp_path: Path) -> None:
    optimized = save(tmp_path, "b.onnx", classifier(batch=1))
    with pytest.raises(InvalidResultError) as caught:
        compare(original, optimized, TARGET)
    assert str(caught.value) == (
        f"got inputs 'x' float 1x6 in {optimized}; expected 'x' float Nx6 as in the original; "
        "find the pass with --bisect, and report it"
    )


def test_reordered_outputs_are_a_changed_signature(original: Path, tmp_path: Path) -> None:
    proto = classifier()
    outputs = list(proto.graph.output)[::-1]
    del proto.graph.output[:]
    proto.graph.output.extend(outputs)
    with pytest.raises(InvalidResultError, match="got outputs 'logits' float Nx4, 'p' float Nx4 in"):
        compare(original, save(tmp_path, "b.onnx", proto), TARGET)


def test_a_file_the_checker_refuses(original: Path, tmp_path: Path) -> None:
    proto = classifier()
    proto.graph.node[0].input[1] = "missing"
    with pytest.raises(InvalidResultError, match="; expected a file the ONNX checker accepts; report this as a bug"):
        compare(original, save(tmp_path, "b.onnx", proto), TARGET)


def test_what_inference_has_against_the_original_is_tolerated(tmp_path: Path) -> None:
    proto = classifier()
    proto.graph.output[1].type.tensor_type.shape.dim[1].dim_value = 5
    path = save(tmp_path, "a.onnx", proto)
    assert compare(path, path, TARGET).relative_error == 0.0


@pytest.mark.parametrize("content", [None, b"no protobuf at all"])
def test_files_that_cannot_be_read(original: Path, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "b.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"b\.onnx, which cannot be read .*; expected an ONNX model; check the path"):
        compare(original, path, TARGET)


def test_types_without_kernels_are_compared_with_the_reference(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "w")
    proto = model(
        [helper.make_node("Conv", ["x", "w"], ["y"])],
        [value("x", ["N", 3, "H", "W"], TensorProto.BFLOAT16)],
        [value("y", ["N", 4, "P", "Q"], TensorProto.BFLOAT16)],
        {"w": numpy_helper.to_array(weight).astype(helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16))},
        opset=22,
        ir_version=10,
    )
    path = save(tmp_path, "a.onnx", proto)
    found = validate(path, path, TARGET, max_error=1e-6)
    assert (found.engine, found.samples) == ("onnx.reference", 2)
    assert "1x3x32x32" in found.notes[0]
    assert "has no kernels for the element types used: compared with onnx.reference" in found.notes[1]


def test_render_shows_every_output(original: Path, tmp_path: Path) -> None:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(render(compare(original, save(tmp_path, "b.onnx", classifier(WEIGHT * 1.01)), TARGET)))
    text = console.export_text()
    assert "over all outputs on 8 synthetic samples (onnxruntime)" in text
    assert "100.00%" in text
    assert "logits" in text


def test_accuracy_sample_by_sample(original: Path, tmp_path: Path) -> None:
    data = read_npz(samples(tmp_path), signature_of(classifier()).inputs)
    assert evaluate(original, data, "top1", TARGET).tolist() == [1.0] * 9
    assert evaluate(original, data, "top1", TARGET, output="logits", batch=4).tolist() == [1.0] * 9
    wrong = save(tmp_path, "b.onnx", classifier(-WEIGHT))
    assert evaluate(wrong, data, "top1", TARGET).sum() == 0


def test_outputs_that_cannot_be_scored(original: Path, tmp_path: Path) -> None:
    data = read_npz(samples(tmp_path), signature_of(classifier()).inputs)
    broken = save(tmp_path, "b.onnx", classifier(WEIGHT * np.float32(np.nan)))
    text = "9 of 9 samples with NaN or infinite top1, in outputs of b.onnx"
    with pytest.raises(NonFiniteResultError, match=f"^got {text}; expected outputs that can be scored; use a smaller"):
        evaluate(broken, data, "top1", TARGET)
    with pytest.raises(InputError) as caught:
        evaluate_original(broken, data, "top1", TARGET)
    assert str(caught.value) == (
        f"got {text}, the original; expected outputs that can be scored; "
        "leave those samples out, or choose another --metric"
    )


def lengths(folder: Path) -> tuple[Path, Path]:
    """A model of an open batch and length, (N, T) -> (N, T) after scaling, and a folder of samples for it."""
    proto = model(
        [helper.make_node("Mul", ["x", "w"], ["y"])],
        [value("x", ["N", "T"])],
        [value("y", ["N", "T"])],
        {"w": np.array([2.0], np.float32)},
    )
    (folder / "data").mkdir()
    for i, size in enumerate((3, 5, 3, 4, 5, 3, 3)):
        array = np.random.default_rng(i).standard_normal((1, size)).astype(np.float32)
        np.savez(folder / "data" / f"{i}.npz", x=array, label=2 * array)
    return save(folder, "a.onnx", proto), folder / "data"


@pytest.mark.parametrize("batch", [1, 2])
def test_samples_of_different_shapes(tmp_path: Path, batch: int) -> None:
    path, folder = lengths(tmp_path)
    data = read_samples(folder, signature_of(onnx.load(path)).inputs)
    target = Target(threads=1, shapes=(InputShapes({"x": (batch, 3)}),))
    found = compare(path, path, target, data)
    assert (found.samples, found.relative_error) == (7, 0.0)
    assert evaluate(path, data, "mse", target).tolist() == [0.0] * 7


def test_accuracy_by_a_metric_of_the_users_own(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("scores_of_mine.py").write_text(
        "def both(outputs, labels):\n"
        "    assert list(outputs) == ['p', 'logits']\n"
        "    return (outputs['p'].argmax(1) == outputs['logits'].argmax(1)) & (labels == 'class')\n"
    )
    x = np.random.default_rng(1).standard_normal((5, 6)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=x, label=["class", "class", "other", "class", "class"])
    data = read_npz(tmp_path / "d.npz", signature_of(classifier()).inputs)
    assert evaluate(original, data, "scores_of_mine:both", TARGET, batch=2).tolist() == [1, 1, 0, 1, 1]


def test_the_limit_is_that_of_the_stated_metric(original: Path, tmp_path: Path) -> None:
    optimized = save(tmp_path, "b.onnx", classifier(WEIGHT * 2))  # the same classes, other probabilities
    found = compare(original, optimized, TARGET, max_error=1e-6, error_metric="top1")
    assert (found.error("top1"), found.error("relative")) == (0.0, found.relative_error)
    found.require_valid()
    with pytest.raises(InvalidResultError) as caught:
        validate(original, optimized, TARGET, max_error=1e-6, error_metric="kl")
    assert str(caught.value).startswith("got kl error ")


def test_accuracy_needs_labels_and_a_known_output(original: Path, tmp_path: Path) -> None:
    specs = signature_of(classifier()).inputs
    np.savez(tmp_path / "bare.npz", x=np.ones((2, 6), np.float32))
    for path, output, text in [
        (tmp_path / "bare.npz", None, "data without labels; expected an array 'label'; add labels, or leave out"),
        (samples(tmp_path), "q", "unknown output 'q'; expected one of 'p', 'logits'; name one of these"),
    ]:
        with pytest.raises(InputError) as caught:
            evaluate(original, read_npz(path, specs), "top1", TARGET, output=output)
        assert text in str(caught.value)
