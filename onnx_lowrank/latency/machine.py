"""What a latency depends on beside the model: processor, its instruction sets, and the accelerator if one is used."""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from onnx_lowrank.runtime import versions
from onnx_lowrank.target import Target

# Instruction sets that choose onnxruntime's kernels, by the names of /proc/cpuinfo.
_ISA = (
    "avx",
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_int8",
    "asimd",
    "sve",
)


@dataclass(frozen=True)
class Processor:
    """The CPU as far as its kernels differ: model name, and instruction sets (empty where they cannot be read)."""

    model: str
    isa: tuple[str, ...]


@functools.cache
def processor() -> Processor:
    """The CPU of this machine, from /proc/cpuinfo where there is one."""
    fields: dict[str, str] = {}
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip().lower(), value.strip())
    flags = set((fields.get("flags") or fields.get("features") or "").split())
    model = fields.get("model name") or platform.processor() or platform.machine() or "unknown CPU"
    return Processor(model, tuple(name for name in _ISA if name in flags))


@functools.cache
def accelerator() -> str:
    """Name and driver of the NVIDIA GPUs, or an empty string."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return driver_gpus()
    query = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)  # noqa: S603 - fixed words
    except (OSError, subprocess.TimeoutExpired):
        return driver_gpus()
    return "; ".join(answer.stdout.splitlines()) if answer.returncode == 0 else driver_gpus()


def driver_gpus(root: Path = Path("/proc/driver/nvidia")) -> str:
    """Name and driver of the NVIDIA GPUs as the Linux driver tells them: containers may lack nvidia-smi."""
    try:
        driver = re.search(r"Module\s+(\d[\d.]+)", (root / "version").read_text())
        texts = [path.read_text() for path in sorted(root.glob("gpus/*/information"))]
    except OSError:
        return ""
    names = [match[1].strip() for text in texts if (match := re.search(r"^Model:(.*)$", text, re.MULTILINE))]
    return "; ".join(f"{name}, {driver[1]}" if driver else name for name in names)


def fingerprint(target: Target) -> str:
    """The hardware that `target` runs on, in words; latencies of different fingerprints are never mixed."""
    cpu = processor()
    words = [cpu.model, *cpu.isa]
    return " ".join(words if target.provider == "cpu" else [*words, "|", accelerator()])


def environment(target: Target) -> dict[str, object]:
    """What the numbers of a report depend on, for its JSON."""
    return {
        "versions": versions(),
        "cpu": processor().model,
        "cores": os.cpu_count(),
        "os": platform.platform(),
        "provider": target.provider,
        "provider_options": dict(target.provider_options),
    }
