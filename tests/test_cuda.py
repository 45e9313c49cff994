"""The CUDA provider, where one loads: on the device, node for node, and the numbers of the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import model, value
from onnx import TensorProto, helper

from onnx_lowrank.errors import ProviderError
from onnx_lowrank.goals import KeepMacs
from onnx_lowrank.latency.gpus import accelerator, selected
from onnx_lowrank.latency.machine import fingerprint
from onnx_lowrank.pipeline import optimize
from onnx_lowrank.providers import provider_reason
from onnx_lowrank.runtime import open_session
from onnx_lowrank.settings import Settings
from onnx_lowrank.synthetic import synthetic_feeds
from onnx_lowrank.target import CONV_SEARCHES, Target
from onnx_lowrank.validation import validate

pytestmark = pytest.mark.cuda
CUDA = Target("cuda", threads=1)


@pytest.fixture(autouse=True)
def cuda() -> None:
    """Skips in onnxruntime's own words where the provider does not load."""
    if (reason := provider_reason("cuda")) is not None:
        pytest.skip(f"no loadable CUDA provider: {reason}")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    weights = {
        "a": (0.1 * rng.standard_normal((16, 8, 3, 3))).astype(np.float32),
        "b": (0.1 * rng.standard_normal((32, 16, 1, 1))).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["h"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Conv", ["r", "b"], ["y"]),
    ]
    proto = model(nodes, [value("x", ["N", 8, 20, 20])], [value("y", ["N", 32, 20, 20])], weights)
    onnx.save(proto, tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def test_outputs_are_those_of_the_cpu(path: Path) -> None:
    device = open_session(path, CUDA.exact())
    host = open_session(path, Target("cpu", threads=1))
    feeds = synthetic_feeds(host.signature.inputs, {"x": (2, 8, 20, 20)}, seed=0)
    np.testing.assert_allclose(device.run(feeds)["y"], host.run(feeds)["y"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("search", ["HEURISTIC", "EXHAUSTIVE"])
def test_provider_options_are_taken_and_a_bound_run_is_timed(path: Path, search: str) -> None:
    session = open_session(path, Target("cuda", threads=1, provider_options={"cudnn_conv_algo_search": search}))
    feeds = synthetic_feeds(session.signature.inputs, {"x": (2, 8, 20, 20)}, seed=0)
    assert all(seconds > 0 for seconds in session.time(feeds, 3))


def test_a_cuda_graph_is_replayed_for_each_shape_and_plain_runs_stay_right(path: Path) -> None:
    session = open_session(path, Target("cuda", threads=1, provider_options={"enable_cuda_graph": "1"}))
    host = open_session(path, Target("cpu", threads=1))
    for seed, batch in enumerate((2, 3)):
        feeds = synthetic_feeds(host.signature.inputs, {"x": (batch, 8, 20, 20)}, seed)
        bound = session.bind(feeds)
        assert all(bound.seconds() > 0 for _ in range(3))
        wanted = host.run(feeds)["y"]
        np.testing.assert_allclose(bound._binding.copy_outputs_to_cpu()[0], wanted, rtol=1e-2, atol=1e-3)
        np.testing.assert_allclose(session.run(feeds)["y"], wanted, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("option", ["prefer_nhwc", "do_copy_in_default_stream", "use_tf32"])
def test_options_that_change_speed_keep_the_numbers(path: Path, option: str) -> None:
    host = open_session(path, Target("cpu", threads=1))
    feeds = synthetic_feeds(host.signature.inputs, {"x": (2, 8, 20, 20)}, seed=0)
    for given in ("0", "1"):
        session = open_session(path, Target("cuda", threads=1, provider_options={option: given}))
        np.testing.assert_allclose(session.run(feeds)["y"], host.run(feeds)["y"], rtol=1e-2, atol=1e-3)


def test_a_model_validates_against_itself(path: Path) -> None:
    found = validate(path, path, CUDA, max_error=1e-4)
    assert found.engine == "onnxruntime"


def test_computations_of_shapes_pass_a_strict_run_and_integers_from_data_do_not(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"], name="shape"),
        helper.make_node("Gather", ["s", "zero"], ["n"], name="gather"),
        helper.make_node("Unsqueeze", ["n", "axis"], ["n1"], name="unsqueeze"),
        helper.make_node("Concat", ["n1", "rest"], ["to"], name="concat", axis=0),
        helper.make_node("Reshape", ["x", "to"], ["y"], name="reshape"),
    ]
    constants = {
        "zero": np.array(0, np.int64),
        "axis": np.array([0], np.int64),
        "rest": np.array([-1], np.int64),
    }
    proto = model(nodes, [value("x", ["N", 4, 4])], [value("y", ["N", "M"])], constants)
    session = open_session(proto.SerializeToString(), CUDA)
    assert {text.partition(" ")[0] for text in session.on_host} <= {"Shape", "Gather", "Unsqueeze", "Concat"}
    text = model(
        [helper.make_node("StringNormalizer", ["x"], ["y"], name="text")],
        [value("x", [1], TensorProto.STRING)],
        [value("y", [1], TensorProto.STRING)],
    )
    with pytest.raises(ProviderError, match="StringNormalizer text"):
        open_session(text.SerializeToString(), CUDA)
    assert open_session(text.SerializeToString(), replace(CUDA, allow_fallback=True)).on_host == ()


def test_the_whole_road_reports_its_provider_options(path: Path, tmp_path: Path, quick: None) -> None:
    report, _ = optimize(path, tmp_path / "out.onnx", Settings(KeepMacs(0.9), CUDA))
    options = report.environment["provider_options"]
    assert isinstance(options, dict)
    assert options["cudnn_conv_algo_search"] in CONV_SEARCHES
    assert options["use_tf32"] == "1"
    assert report.fidelity["engine"] == "onnxruntime"


def test_latencies_are_kept_under_the_name_of_the_gpu() -> None:
    assert accelerator()
    assert fingerprint(CUDA.provider, {}).endswith(f"| {selected('0')}")
