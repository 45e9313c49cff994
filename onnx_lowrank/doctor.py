"""What this installation and this machine can do, and what is wrong with them, in sentences."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from onnx_lowrank.latency.circumstances import Circumstances
from onnx_lowrank.latency.gpus import accelerator
from onnx_lowrank.latency.grid import KINDS, known_block
from onnx_lowrank.latency.machine import processor
from onnx_lowrank.latency.table import LatencyTable, cache_folder
from onnx_lowrank.providers import provider_reason
from onnx_lowrank.runtime import listed_providers, versions
from onnx_lowrank.target import Target

State = Literal["ok", "warning", "error"]
_OLDEST_PYTHON = (3, 11)
_NVIDIA = "it needs an NVIDIA GPU with its driver, and the libraries of pip install 'onnxruntime-gpu[cuda,cudnn]'"
_REMEDIES = {"cuda": _NVIDIA, "tensorrt": f"{_NVIDIA}, and TensorRT: pip install tensorrt"}
_BUILDS = {
    "cuda": "onnxruntime-gpu",
    "tensorrt": "onnxruntime-gpu",
    "openvino": "onnxruntime-openvino",
    "directml": "onnxruntime-directml (Windows)",
    "coreml": "onnxruntime (macOS)",
    "xnnpack": "onnxruntime built with --use_xnnpack",
}
_STYLES = {"ok": "green", "warning": "yellow", "error": "red"}


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis; a warning costs speed or a feature, an error must be mended."""

    name: str
    state: State
    text: str


def diagnose() -> list[Finding]:
    """Look at Python, packages, providers, processor and cache. Takes a second or two; changes nothing."""
    return [
        _python(),
        *(Finding(name, "ok", version) for name, version in versions().items() if name != "python"),
        runtime_mixture(_installed_runtimes()),
        *map(_provider, listed_providers()),
        missing_providers(listed_providers()),
        _cpu(),
        Finding("accelerator", "ok", accelerator() or "none that nvidia-smi knows of"),
        Finding("threads", "ok", f"{Target().threads} of {os.cpu_count()} cores may be used"),
        _cache(),
        *_table(),
        _torch(),
    ]


def render(findings: list[Finding], console: Console) -> None:
    """Print the diagnosis as a table."""
    table = Table("", "", "", show_header=False, box=None)
    for finding in findings:
        table.add_row(f"[{_STYLES[finding.state]}]{finding.state}[/]", finding.name, escape(finding.text))
    console.print(table)


def runtime_mixture(distributions: dict[str, str]) -> Finding:
    """Judge the installed distributions of onnxruntime: several of them overwrite each other's files.

    Args:
        distributions: Distribution name -> version.
    """
    listed = ", ".join(f"{name} {version}" for name, version in distributions.items())
    if len(distributions) > 1:
        names = " ".join(distributions)
        text = f"{listed} install the same module; pip uninstall {names}, then install one of them"
        return Finding("onnxruntime packages", "error", text)
    if not distributions:
        return Finding("onnxruntime packages", "warning", "onnxruntime was not installed by pip")
    return Finding("onnxruntime packages", "ok", listed)


def _installed_runtimes() -> dict[str, str]:
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        name = str(distribution.metadata["Name"] or "").lower().replace("_", "-")
        if name == "onnxruntime" or (name.startswith("onnxruntime-") and "extensions" not in name):
            found[name] = distribution.version
    return found


def _python() -> Finding:
    text = f"{sys.version.split()[0]} ({sys.platform})"
    if sys.version_info < _OLDEST_PYTHON:
        return Finding("python", "error", f"{text}; {'.'.join(map(str, _OLDEST_PYTHON))} or newer is needed")
    return Finding("python", "ok", text)


def _provider(name: str) -> Finding:
    reason = provider_reason(name)
    if reason is None:
        return Finding(f"provider {name}", "ok", "loads and runs")
    remedy = f"; {_REMEDIES[name]}" if name in _REMEDIES else ""
    return Finding(f"provider {name}", "warning", f"does not load: {reason.rstrip('.')}{remedy}")


def missing_providers(listed: Collection[str]) -> Finding:
    """Say what brings the providers this build of onnxruntime lacks; a build brings one family only.

    Args:
        listed: Short names of those it has.
    """
    builds = [f"{name}: {build}" for name, build in _BUILDS.items() if name not in listed]
    return Finding("other providers", "ok", "; ".join(builds) or "this build has all of them")


def _cpu() -> Finding:
    cpu = processor()
    if not cpu.isa:
        return Finding("cpu", "ok", f"{cpu.model}; instruction sets unknown")
    slow = "avx" in cpu.isa and "avx2" not in cpu.isa
    text = f"{cpu.model}; {', '.join(cpu.isa)}"
    return Finding("cpu", "warning" if slow else "ok", f"{text}; no AVX2: convolutions are slow" if slow else text)


def _cache() -> Finding:
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        return Finding("cache", "warning", f"{folder} cannot be written ({reason}): every run measures anew")
    return Finding("cache", "ok", str(folder))


def _table() -> list[Finding]:
    with LatencyTable() as table:
        size = table.path.stat().st_size / 1e6 if table.path.exists() else 0.0
        findings = [Finding("latency table", "ok", f"{len(table)} measurements, {size:.1f} MB")]
        asked = [Target(threads=1), Target(), *(where.target() for where in table.circumstances())]
        here = dict.fromkeys(map(Circumstances.here, asked))
        for kind in KINDS:
            blocks = {_conditions(where): known_block(where, table, kind) for where in here}
            known = ", ".join(f"{block} with {named}" for named, block in sorted(blocks.items()) if block is not None)
            findings.append(Finding(f"channel block, {kind}", "ok", known or "not probed yet"))
    return findings


def _conditions(where: Circumstances) -> str:
    options = "".join(f", {name}={value}" for name, value in where.options)
    return f"{where.threads} thread(s)" + ("" if where.provider == "cpu" else f" on {where.provider}{options}")


def _torch() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding("torch", "ok", "not installed; only training needs it: pip install onnx-lowrank[train]")
    return Finding("torch", "ok", metadata.version("torch"))
