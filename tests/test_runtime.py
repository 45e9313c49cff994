"""Sessions run where asked or say why not; traces see every node; twins compute the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import model, value
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnx_lowrank.errors import InputError, ProviderError
from onnx_lowrank.graph.twin import fp32_feeds, fp32_twin
from onnx_lowrank.layer import NodeShapes
from onnx_lowrank.native_log import native_reason
from onnx_lowrank.providers import provider_reason
from onnx_lowrank.runtime import (
    UnsupportedTypeError,
    open_session,
    trace,
    versions,
)
from onnx_lowrank.target import Target

ONE = Target(threads=1)


def conv(elem_type: int = TensorProto.FLOAT) -> ModelProto:
    weight = np.random.default_rng(1).standard_normal((4, 3, 3, 3)).astype(helper.tensor_dtype_to_np_dtype(elem_type))
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], name="c")]
    io = ([value("x", ["n", 3, 8, 8], elem_type)], [value("y", ["n", 4, 6, 6], elem_type)])
    return model(nodes, *io, {"w": weight}, opset=22, ir_version=10)


def nested() -> ModelProto:
    """MatMuls in a Loop (3 rounds), in both branches of an If, and in a Scan over 5 steps."""

    def body(name: str, inputs: list[onnx.ValueInfoProto], extra: bool = False) -> onnx.GraphProto:
        nodes = [helper.make_node("MatMul", ["s" if extra else "e", "w"], ["r"], name=name)]
        outputs = [value("r", [2, 4])]
        if extra:
            nodes.append(helper.make_node("Identity", ["c"], ["c2"]))
            outputs.insert(0, value("c2", [], TensorProto.BOOL))
        return helper.make_graph(nodes, name, inputs, outputs)

    def branch(name: str) -> onnx.GraphProto:
        node = helper.make_node("MatMul", ["y", "w"], [f"{name}_z"], name=name)
        return helper.make_graph([node], name, [], [value(f"{name}_z", [2, 4])])

    loop = body(
        "in_loop", [value("i", [], TensorProto.INT64), value("c", [], TensorProto.BOOL), value("s", [2, 4])], True
    )
    nodes = [
        helper.make_node("Loop", ["three", "", "x"], ["y"], name="loop", body=loop),
        helper.make_node("If", ["yes"], ["u"], name="if", then_branch=branch("in_then"), else_branch=branch("in_else")),
        helper.make_node(
            "Scan", ["q"], ["v"], name="scan", body=body("in_scan", [value("e", [2, 4])]), num_scan_inputs=1
        ),
    ]
    weights = {"w": np.eye(4, dtype=np.float32), "three": np.array(3, np.int64)}
    inputs = [value("x", [2, 4]), value("q", [5, 2, 4]), value("yes", [], TensorProto.BOOL)]
    return model(nodes, inputs, [value("u", [2, 4]), value("v", [5, 2, 4])], weights)


def message(call) -> str:
    with pytest.raises((InputError, ProviderError)) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_run_signature_and_time():
    session = open_session(conv().SerializeToString(), ONE)
    assert [str(spec) for spec in session.signature.inputs] == ["'x' float nx3x8x8"]
    assert session.signature.outputs[0].shape == ("n", 4, 6, 6)
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    y = session.run({"x": x})["y"]
    weight = numpy_helper.to_array(conv().graph.initializer[0]).astype(np.float64)
    windows = np.lib.stride_tricks.sliding_window_view(x.astype(np.float64), (3, 3), axis=(2, 3))
    np.testing.assert_allclose(y, np.einsum("nchwij,ocij->nohw", windows, weight), rtol=1e-4, atol=1e-5)
    seconds = session.time({"x": x}, 4)
    assert len(seconds) == 4
    assert all(second > 0 for second in seconds)


def test_model_with_external_data_by_path(tmp_path: Path):
    path = tmp_path / "m.onnx"
    onnx.save(conv(), path, save_as_external_data=True, location="m.data", size_threshold=0)
    x = {"x": np.ones((1, 3, 8, 8), np.float32)}
    expected = open_session(conv().SerializeToString(), ONE).run(x)["y"]
    np.testing.assert_array_equal(open_session(path, ONE).run(x)["y"], expected)


@pytest.mark.parametrize("elem_type", [TensorProto.DOUBLE, TensorProto.BFLOAT16])
def test_missing_kernel_has_its_own_error_and_a_twin(elem_type):
    original = conv(elem_type)
    with pytest.raises(
        UnsupportedTypeError, match=r"Could not find an implementation for Conv\(22\) node with name 'c'"
    ):
        open_session(original.SerializeToString(), ONE)
    twin = fp32_twin(original)
    onnx.checker.check_model(twin, full_check=True)
    assert original.graph.input[0].type.tensor_type.elem_type == elem_type
    x = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(helper.tensor_dtype_to_np_dtype(elem_type))
    feeds = fp32_feeds({"x": x})
    expected = open_session(conv().SerializeToString(), ONE).run(feeds)["y"]
    tolerance = 1e-5 if elem_type == TensorProto.DOUBLE else 0.1
    np.testing.assert_allclose(open_session(twin.SerializeToString(), ONE).run(feeds)["y"], expected, atol=tolerance)


def test_twin_converts_casts_constants_and_bodies():
    half = TensorProto.FLOAT16
    constant = numpy_helper.from_array(np.ones(2, np.float16), "k")
    then = helper.make_graph(
        [helper.make_node("Constant", [], ["t"], value=constant)], "then", [], [value("t", [2], half)]
    )
    other = helper.make_graph([helper.make_node("Cast", ["x"], ["o"], to=half)], "else", [], [value("o", [2], half)])
    nodes = [
        helper.make_node("If", ["yes"], ["z"], then_branch=then, else_branch=other),
        helper.make_node("Cast", ["z"], ["y"], to=TensorProto.INT64),
    ]
    inputs = [value("x", [2], TensorProto.DOUBLE), value("yes", [], TensorProto.BOOL)]
    twin = fp32_twin(model(nodes, inputs, [value("y", [2], TensorProto.INT64)]))
    onnx.checker.check_model(twin, full_check=True)
    session = open_session(twin.SerializeToString(), ONE)
    x = np.array([2.7, -1.2], np.float32)
    np.testing.assert_array_equal(session.run({"x": x, "yes": np.array(True)})["y"], [1, 1])
    np.testing.assert_array_equal(session.run({"x": x, "yes": np.array(False)})["y"], [2, -1])


def test_cuda_that_cannot_load_is_an_error_with_the_reason(capfd):
    if provider_reason("cuda") is None:
        pytest.skip("CUDA works here")
    text = message(lambda: open_session(conv().SerializeToString(), Target("cuda")))
    assert text.startswith("got provider cuda that does not load here (")
    assert text.endswith(
        "expected a working CUDAExecutionProvider; install what it needs (onnx-lowrank doctor says more), "
        "or choose another provider"
    )
    reason = provider_reason("cuda")
    assert reason is not None
    assert reason in text
    assert capfd.readouterr() == ("", "")


def test_providers_are_probed():
    assert provider_reason("cpu") is None
    assert "built with" in (provider_reason("coreml") or "")


def test_error_texts():
    session = open_session(conv().SerializeToString(), ONE)
    bad = np.zeros((1, 3, 9, 8), np.float32)
    assert message(lambda: open_session(conv().SerializeToString(), Target(provider_options={"foo": "1"}))) == (
        "got unknown option foo of provider cpu; expected none: it has no options; correct it"
    )
    assert message(lambda: session.run({"x": bad.astype(np.float64)})) == (
        f"got inputs that a model of {conv().ByteSize()} bytes cannot run on (Unexpected input data type. Actual: "
        "(tensor(double)) , expected: (tensor(float))); expected 'x' float nx3x8x8; give inputs like these"
    )
    assert "Got: 9 Expected: 8" in message(lambda: session.run({"x": bad}))
    assert "Got: 9 Expected: 8" in message(lambda: session.bind({"x": bad}))
    assert "Required inputs (['x']) are missing" in message(lambda: session.run({}))
    assert "protobuf parsing failed" in message(lambda: open_session(b"garbage", ONE))
    assert "File doesn't exist" in message(lambda: open_session(Path("nowhere.onnx"), ONE))


def test_native_reason_strips_what_only_a_developer_reads():
    log = (
        "\x1b[1;31m2026-01-01 00:00:00.1 [E:onnxruntime:Default, bridge.cc:1 operator()] /src/bridge.cc:2 "
        "onnxruntime::Provider& Get() [ONNXRuntimeError] : 1 : FAIL : Failed to load library x.so with error: "
        "libcublasLt.so.13: cannot open shared object file\n\x1b[m"
    )
    assert native_reason(log) == "libcublasLt.so.13: cannot open shared object file"
    openvino = (
        "\x1b[1;31m2026-01-01 00:00:00.1 [E:onnxruntime:Default, bridge.cc:1 Create] /src/factory.cc:141 std::string "
        "ParseDeviceType(int) [ERROR] [OpenVINO] Device GPU is not available\n\x1b[m\n2026-01-01 00:00:00.2 [W:onn"
    )
    assert native_reason(openvino) == "Device GPU is not available"
    assert native_reason("[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Invalid\n model.") == "Invalid model."


def test_trace_covers_bodies_and_prepacked_weights():
    feeds = {
        "x": np.ones((2, 4), np.float32),
        "q": np.ones((5, 2, 4), np.float32),
        "yes": np.array(False),
    }
    shapes = trace(nested().SerializeToString(), feeds, ONE)
    product = ((2, 4), (4, 4)), ((2, 4),)
    assert shapes["in_loop"] == [NodeShapes(*product, 3)]
    assert shapes["in_scan"] == [NodeShapes(*product, 5)]
    assert shapes["in_else"] == [NodeShapes(*product, 1)]
    assert "in_then" not in shapes


def test_profile_events_name_fused_kernels(tmp_path: Path):
    session = open_session(conv().SerializeToString(), ONE, profile_to=tmp_path)
    session.run({"x": np.ones((1, 3, 8, 8), np.float32)})
    events = session.profile_events()
    assert {event.provider for event in events} == {"CPUExecutionProvider"}
    assert any(event.op == "Conv" and event.output_shapes[0][0] == 1 for event in events)


def test_versions_name_what_numbers_depend_on():
    assert {"python", "onnxruntime", "onnx", "numpy"} <= set(versions())


def test_wrongly_declared_output_is_timed_all_the_same():
    proto = conv()
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value += 3
    feeds = {"x": np.ones((1, 3, 8, 8), np.float32)}
    assert len(open_session(proto.SerializeToString(), ONE).time(feeds, 3)) == 3
