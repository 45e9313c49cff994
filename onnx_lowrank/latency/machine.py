"""What a latency depends on beside the model: processor, its instruction sets, and the accelerator if one is used.

Needs the standard library alone: `latency request` copies this file into the script that it writes.
"""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from onnx_lowrank.latency.gpus import accelerator, selected

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
_CPUS = Path("/sys/devices/system/cpu")
_WINDOWS_KEY = r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"


@dataclass(frozen=True)
class Processor:
    """The CPU as far as latencies differ.

    Args:
        model: Its name, for readers; others may bear the same one ("AMD EPYC").
        isa: Instruction sets, empty where they cannot be read.
        details: What tells machines of that name apart, in words: family and stepping or the cores' parts, board,
            caches, number of processors.
    """

    model: str
    isa: tuple[str, ...]
    details: tuple[str, ...] = ()


@functools.cache
def processor() -> Processor:
    """The CPU of this machine, by what its system says of it."""
    board = _text(Path("/proc/device-tree/model")).strip("\0\n ")
    more = [*caches(_CPUS / "cpu0" / "cache"), _processors()]
    if sys.platform == "win32":
        more.append(platform.processor())  # family, model and stepping
    found = described(_text(Path("/proc/cpuinfo")), board, _name(), more)
    return replace(found, model=found.model or platform.processor() or platform.machine() or "unknown CPU")


def described(cpuinfo: str, board: str = "", name: str = "", more: Sequence[str] = ()) -> Processor:
    """A processor as Linux tells it, or what is known elsewhere.

    Args:
        cpuinfo: The text of /proc/cpuinfo; empty where there is none. On ARM it names no model, only the parts of
            the cores, and often the board.
        board: As the device tree names it.
        name: Of the processor, where the system has other means.
        more: Other details.
    """
    cores = [_fields(core) for core in cpuinfo.split("\n\n")]
    first = {key: value for core in reversed(cores) for key, value in core.items()}
    x86 = "cpu family" in first  # where "model" is a number; on ARM it is the board
    board = board or ("" if x86 else first.get("model", ""))
    model = first.get("model name") or name or board
    flags = (first.get("flags") or first.get("features") or "").split()
    words = [("family", "cpu family"), ("model", "model"), ("stepping", "stepping")] if x86 else []
    parts = {f"{core['cpu implementer']}:{core['cpu part']}" for core in cores if "cpu part" in core}
    details = [f"{word} {first[key]}" for word, key in words if key in first]
    details += [f"part {part}" for part in sorted(parts)] + [board if board != model else "", *more]
    return Processor(model, tuple(name for name in _ISA if name in flags), tuple(filter(None, details)))


def caches(folder: Path) -> tuple[str, ...]:
    """Sizes of the second and third level, from a core's folder under /sys; nothing where it does not tell."""
    sizes = {_text(index / "level").strip(): _text(index / "size").strip() for index in sorted(folder.glob("index*"))}
    return tuple(f"L{level} {sizes[level]}" for level in ("2", "3") if sizes.get(level))


def fingerprint(provider: str, options: Mapping[str, str]) -> str:
    """The hardware that a provider runs on, in words; latencies of two are never mixed.

    Args:
        provider: Its short name.
        options: Provider options, which may choose the device.
    """
    cpu = processor()
    words = [cpu.model, *cpu.isa, *cpu.details]
    if provider == "cpu":
        return " ".join(words)
    cuda = provider in {"cuda", "tensorrt"}
    return " ".join([*words, "|", selected(options.get("device_id", "0")) if cuda else accelerator()])


def _fields(core: str) -> dict[str, str]:
    lines = (line.partition(":") for line in core.splitlines())
    return {name.strip().lower(): value.strip() for name, _, value in lines if value.strip()}


def _processors() -> str:
    """All of the machine, whatever this process may use of them: a pinned process is on the same machine."""
    return f"cpus {_text(_CPUS / 'present').strip() or f'0-{(os.cpu_count() or 1) - 1}'}"


def _name() -> str:
    """The processor's name on macOS and Windows, where Python says "arm" or a family only."""
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string")
    if sys.platform == "win32":
        import winreg  # noqa: PLC0415 - there on Windows alone

        try:
            with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, _WINDOWS_KEY) as key:
                return str(winreg.QueryValueEx(key, "ProcessorNameString")[0]).strip()
        except OSError:
            return ""
    return ""


def _sysctl(name: str) -> str:
    command = [shutil.which("sysctl") or "/usr/sbin/sysctl", "-n", name]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)  # noqa: S603 - fixed words
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip()


def _text(path: Path) -> str:
    """A file's text; empty where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
