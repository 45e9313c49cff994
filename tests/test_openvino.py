"""OpenVINO, a provider beside the default ones, from the command line of an environment that has it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import model, value
from onnx import helper

import onnx_lowrank
from onnx_lowrank.latency.table import CACHE_VARIABLE

pytestmark = pytest.mark.openvino
VARIABLE = "ONNX_LOWRANK_OPENVINO_PYTHON"
ROOT = Path(onnx_lowrank.__file__).parent.parent
EMBEDDED = ROOT / "onnx_lowrank" / "assets" / "fashion_resnet.onnx"
CALIBRATION = EMBEDDED.with_name("calibration.npz")
OPENVINO = ("--provider", "openvino", "--threads", "1")
CLOCKS = """
import sys, time
import numpy as np
from pathlib import Path
from onnx_lowrank.runtime import open_session
from onnx_lowrank.target import Target
session = open_session(Path(sys.argv[1]), Target("openvino", threads=1))
feeds = {"image": np.ones((8, 1, 28, 28), np.float32)}
session.run(feeds)
thread, process = time.thread_time(), time.process_time()
for _ in range(20):
    session.run(feeds)
print((time.thread_time() - thread) / (time.process_time() - process))
"""


@pytest.fixture
def python() -> str:
    """The interpreter; skips where none is named, and fails where the one named has no OpenVINO."""
    named = os.environ.get(VARIABLE)
    if not named:
        pytest.skip(f"{VARIABLE} names no interpreter with onnxruntime-openvino; `make openvino` makes one")
    return named


def run(python: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = [python, *map(str, words)]
    return subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=280, check=False)


def command(python: str, *words: str | Path, exits: tuple[int, ...] = (0,)) -> subprocess.CompletedProcess[str]:
    done = run(python, "-m", "onnx_lowrank", *words)
    assert done.returncode in exits, done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def path(tmp_path: Path) -> Path:
    weight = np.random.default_rng(0).standard_normal((8, 4, 3, 3)).astype(np.float32)
    convolution = helper.make_node("Conv", ["x", "w"], ["y"], name="conv")
    proto = model([convolution], [value("x", [1, 4, 9, 9])], [value("y", [1, 8, 7, 7])], {"w": weight})
    onnx.save(proto, tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def test_doctor_reports_the_build(python: str) -> None:
    findings = {row["name"]: row for row in json.loads(command(python, "doctor", "--json").stdout)}
    assert findings["provider openvino"]["text"] == "loads and runs"
    assert findings["onnxruntime packages"]["text"].startswith("onnxruntime-openvino ")
    assert findings["other providers"]["text"].startswith("cuda: onnxruntime-gpu")


def test_every_node_is_placed_and_told(python: str) -> None:
    found = json.loads(command(python, "profile", EMBEDDED, *OPENVINO, "--seconds", "1", "--json").stdout)
    (entry,) = found["models"]
    (placed,) = entry["placement"]
    assert placed["provider"] == "OpenVINOExecutionProvider"
    assert placed["nodes"] == sum(placed["operators"].values())
    convolutions = sum(node.op_type == "Conv" for node in onnx.load(EMBEDDED).graph.node)
    assert placed["operators"]["Conv"] == convolutions
    assert entry["level"] in {"basic", "none"}


def test_one_thread_means_the_thread_that_asks(python: str) -> None:
    done = run(python, "-c", CLOCKS, EMBEDDED)
    assert float(done.stdout) > 0.95, done.stderr


def test_outputs_are_those_of_the_cpu(python: str, tmp_path: Path) -> None:
    program = (
        "import sys, numpy as np; from pathlib import Path; from onnx_lowrank.runtime import open_session;"
        "from onnx_lowrank.target import Target; feeds = dict(np.load(sys.argv[2]));"
        "a, b = (open_session(Path(sys.argv[1]), Target(p, threads=1)).run(feeds) for p in ('openvino', 'cpu'));"
        "[np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=1e-4) for name in b]; print('same')"
    )
    np.savez(tmp_path / "x.npz", image=np.random.default_rng(0).random((4, 1, 28, 28), np.float32))
    done = run(python, "-c", program, EMBEDDED, tmp_path / "x.npz")
    assert done.stdout.strip() == "same", done.stderr


@pytest.mark.parametrize("samples", [(), ("--calibration", CALIBRATION, "--samples", "64")], ids=["", "calibrated"])
def test_the_whole_road(
    python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, samples: tuple[str | Path, ...]
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    out, folder = tmp_path / "out.onnx", tmp_path / "report"
    words = ("optimize", EMBEDDED, "-o", out, "--speedup", "1.3", "--time-limit", "20", "--passes", "spatial_svd")
    words += samples
    command(python, *words, *OPENVINO, "--report", folder, exits=(0, 3))
    report = json.loads((folder / "report.json").read_text())
    environment = report["environment"]
    assert environment["provider"] == "openvino"
    assert environment["provider_options"] == {"device_type": "CPU", "num_of_threads": "1"}
    assert report["chains_timed"] > 0
    assert not report["dropped"]
    assert any(row["decision"] == "factorized" for row in report["layers"])
    assert report["latency"]["clock"] == "cpu"
    command(python, "validate", EMBEDDED, out, *OPENVINO, exits=(0,))


def test_a_device_that_is_missing(python: str, path: Path, tmp_path: Path) -> None:
    words = ("optimize", path, "-o", tmp_path / "out.onnx", "--speedup", "1.1", *OPENVINO)
    text = command(python, *words, "--provider-option", "device_type=GPU", exits=(2,)).stderr
    assert text == (
        "error: got provider openvino that does not load here (Device GPU is not available); expected a "
        "working OpenVINOExecutionProvider; install what it needs (onnx-lowrank doctor says more), or choose another "
        "provider\n"
    )


def test_an_option_openvino_does_not_know(python: str, path: Path) -> None:
    done = command(python, "profile", path, *OPENVINO, "--provider-option", "bogus=1", exits=(2,))
    assert "Invalid OpenVINO EP option: bogus" in done.stderr


def test_nodes_openvino_leaves_are_an_error_unless_allowed(python: str, tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["h"], name="relu"), helper.make_node("Det", ["h"], ["y"], name="det")]
    onnx.save(model(nodes, [value("x", [1, 4, 7, 7])], [value("y", [1, 4])]), tmp_path / "det.onnx")
    words = ("profile", tmp_path / "det.onnx", *OPENVINO, "--seconds", "0.1", "--json")
    assert "nodes that openvino leaves to another provider (" in command(python, *words, exits=(2,)).stderr
    found = json.loads(command(python, *words, "--allow-fallback").stdout)
    placed = {row["provider"]: row["operators"] for row in found["models"][0]["placement"]}
    assert placed["CPUExecutionProvider"]["Det"] == 1
