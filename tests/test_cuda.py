"""The CUDA provider, where one loads: on the device, node for node, and the numbers of the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import model, value
from onnx import helper

from onnx_lowrank.runtime import open_session, provider_reason
from onnx_lowrank.synthetic import synthetic_feeds
from onnx_lowrank.target import Target
from onnx_lowrank.validation import validate

pytestmark = pytest.mark.cuda
EXACT = {"use_tf32": "0"}  # TensorFloat-32 is on by default and differs by 1e-3


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
    device = open_session(path, Target("cuda", threads=1, provider_options=EXACT))
    host = open_session(path, Target("cpu", threads=1))
    feeds = synthetic_feeds(host.signature.inputs, {"x": (2, 8, 20, 20)}, seed=0)
    np.testing.assert_allclose(device.run(feeds)["y"], host.run(feeds)["y"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("search", ["HEURISTIC", "EXHAUSTIVE"])
def test_provider_options_are_taken_and_a_bound_run_is_timed(path: Path, search: str) -> None:
    session = open_session(path, Target("cuda", threads=1, provider_options={"cudnn_conv_algo_search": search}))
    feeds = synthetic_feeds(session.signature.inputs, {"x": (2, 8, 20, 20)}, seed=0)
    assert all(seconds > 0 for seconds in session.time(feeds, 3))


def test_a_model_validates_against_itself(path: Path) -> None:
    found = validate(path, path, Target("cuda", threads=1, provider_options=EXACT), max_error=1e-4)
    assert found.engine == "onnxruntime"
