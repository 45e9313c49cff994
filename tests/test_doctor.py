"""The diagnosis names what is wrong with an installation."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from onnx_lowrank.doctor import Finding, diagnose, render, runtime_mixture
from onnx_lowrank.latency.grid import channel_block
from onnx_lowrank.latency.table import CACHE_VARIABLE, LatencyTable
from onnx_lowrank.providers import provider_reason
from onnx_lowrank.target import Target


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    return tmp_path


def by_name() -> dict[str, Finding]:
    return {finding.name: finding for finding in diagnose()}


def test_diagnosis_of_this_machine(cache):
    findings = by_name()
    assert findings["provider cpu"] == Finding("provider cpu", "ok", "loads and runs")
    assert findings["cache"] == Finding("cache", "ok", str(cache))
    assert findings["latency table"].text.startswith("0 measurements")
    assert findings["channel block, conv"].text == "not probed yet"
    assert findings["onnxruntime packages"].state == "ok"
    if "provider cuda" in findings and provider_reason("cuda") is not None:
        assert findings["provider cuda"].state == "warning"
        assert findings["provider cuda"].text.startswith("does not load: ")


def test_known_block_is_told():
    with LatencyTable() as table:
        block = channel_block(Target(threads=1), table)
    assert f"{block} with 1 thread(s)" in by_name()["channel block, conv"].text


def test_two_runtimes_overwrite_each_other():
    finding = runtime_mixture({"onnxruntime": "1.20.0", "onnxruntime-gpu": "1.31.1"})
    assert finding == Finding(
        "onnxruntime packages",
        "error",
        "onnxruntime 1.20.0, onnxruntime-gpu 1.31.1 install the same module; "
        "pip uninstall onnxruntime onnxruntime-gpu, then install one of them",
    )
    assert runtime_mixture({}).state == "warning"


def test_cache_that_cannot_be_written(cache, monkeypatch):
    (cache / "file").write_text("in the way")
    monkeypatch.setenv(CACHE_VARIABLE, str(cache / "file"))
    finding = by_name()["cache"]
    assert finding.state == "warning"
    assert "every run measures anew" in finding.text


def test_rendered_findings_keep_brackets():
    console = Console(width=120)
    with console.capture() as captured:
        render([Finding("torch", "ok", "pip install onnx-lowrank[train]"), Finding("x", "error", "bad")], console)
    assert "onnx-lowrank[train]" in captured.get()
    assert "error" in captured.get()
