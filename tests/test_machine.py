"""Different machines have different fingerprints, the same machine always has the same, and its name stays short."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from onnx_lowrank.latency.circumstances import Circumstances
from onnx_lowrank.latency.gpus import Card, chosen, driver_cards, listed_cards
from onnx_lowrank.latency.machine import Processor, caches, described, fingerprint, processor
from onnx_lowrank.search.elsewhere import Choice
from onnx_lowrank.target import Target

EPYC = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: {family}
model\t\t: {model}
model name\t: AMD EPYC
stepping\t: 1
flags\t\t: fpu sse avx avx2 fma
power management:

processor\t: 1
vendor_id\t: AuthenticAMD
cpu family\t: {family}
model\t\t: {model}
model name\t: AMD EPYC
stepping\t: 1
flags\t\t: fpu sse avx avx2 fma
power management:
"""
ARM_CORE = """processor\t: {number}
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm crc32 cpuid
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: {part}
CPU revision\t: 3

"""
OLD, NEW = (Card(f"GPU-{name}", name, "550.54") for name in ("T4", "L4"))


def arm(*parts: str, tail: str = "") -> str:
    return "".join(ARM_CORE.format(number=number, part=part) for number, part in enumerate(parts)) + tail


def test_generations_of_a_generic_name_differ() -> None:
    milan, genoa = (described(EPYC.format(family=25, model=model)) for model in (1, 17))
    assert milan == Processor("AMD EPYC", ("avx", "avx2", "fma"), ("family 25", "model 1", "stepping 1"))
    assert genoa.details == ("family 25", "model 17", "stepping 1")


def test_arm_boards_differ_by_name_and_by_the_parts_of_their_cores() -> None:
    four, five = "Raspberry Pi 4 Model B Rev 1.4", "Raspberry Pi 5 Model B Rev 1.0"
    pi4 = described(arm("0xd08", "0xd08", tail=f"Revision\t: c03114\nModel\t\t: {four}\n"))
    assert pi4 == Processor(four, ("asimd",), ("part 0x41:0xd08",))
    assert described(arm("0xd0b"), five) == Processor(five, ("asimd",), ("part 0x41:0xd0b",))
    assert described(arm("0xd08", tail=f"Model: {four}\n"), four) == pi4, "a container may not see the device tree"


def test_cores_of_all_kinds_count() -> None:
    big_little = described(arm("0xd05", "0xd05", "0xd0a"), name="a phone")
    assert big_little == Processor("a phone", ("asimd",), ("part 0x41:0xd05", "part 0x41:0xd0a"))
    assert described(arm("0xd0a", "0xd05"), name="a phone") == big_little


def test_where_there_is_no_cpuinfo_the_system_is_asked() -> None:
    assert described("", "", "Apple M2 Pro", ["cpus 0-9"]) == Processor("Apple M2 Pro", (), ("cpus 0-9",))
    assert described("").model == ""


def test_caches_are_told_apart(tmp_path: Path) -> None:
    assert caches(tmp_path) == ()
    for number, (level, size) in enumerate([("1", "32K"), ("1", "32K"), ("2", "1024K"), ("3", "32768K")]):
        (tmp_path / f"index{number}").mkdir()
        (tmp_path / f"index{number}" / "level").write_text(f"{level}\n")
        (tmp_path / f"index{number}" / "size").write_text(f"{size}\n")
    assert caches(tmp_path) == ("L2 1024K", "L3 32768K")


def test_a_device_is_chosen_by_any_of_its_words() -> None:
    where = Circumstances.here(Target(threads=1))
    cpu = processor()
    assert where.device.startswith(cpu.model)
    for word in (cpu.model.upper(), *cpu.isa, *cpu.details):
        assert Choice(word).fits(where)
    assert not Choice("a toaster").fits(where)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes cannot be pinned here")
def test_a_pinned_process_is_on_the_same_machine() -> None:
    script = (
        f"import os; os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}})\n"
        "from onnx_lowrank.latency.machine import fingerprint; print(fingerprint('cpu', {}))"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.strip() == fingerprint("cpu", {})


@pytest.mark.parametrize(
    ("number", "visible", "card"),
    [
        ("1", "GPU-T4,GPU-L4", "L4, 550.54"),
        ("0", "GPU-L", "L4, 550.54"),
        ("0", None, "T4, 550.54; L4, 550.54, device 0"),
        ("0", "1", "T4, 550.54; L4, 550.54, device 0 of CUDA_VISIBLE_DEVICES=1"),
        ("0", "MIG-1", "T4, 550.54; L4, 550.54, device 0 of CUDA_VISIBLE_DEVICES=MIG-1"),
        ("0", "", "T4, 550.54; L4, 550.54, device 0 of CUDA_VISIBLE_DEVICES="),
        ("7", None, "T4, 550.54; L4, 550.54, device 7"),
    ],
)
def test_the_card_in_use_is_named(number: str, visible: str | None, card: str) -> None:
    assert chosen([OLD, NEW], number, visible) == card


def test_numbers_by_bus_and_cards_that_are_alike_name_one_card() -> None:
    assert chosen([OLD, NEW], "1", None, by_bus=True) == "L4, 550.54"
    assert chosen([OLD, NEW], "0", "1, 0", by_bus=True) == "L4, 550.54"
    assert chosen([OLD, OLD], "1", None) == "T4, 550.54"
    assert chosen([], "0", None) == ""


def test_what_nvidia_smi_answers() -> None:
    assert listed_cards("GPU-T4, T4, 550.54\nGPU-L4, L4, 550.54\n\n") == (OLD, NEW)


def test_gpus_are_known_where_nvidia_smi_is_missing(tmp_path: Path) -> None:
    assert driver_cards(tmp_path) == ()
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue\nGCC: 12\n")
    for number in ("0000:3b:00.0", "0000:5e:00.0"):
        (tmp_path / "gpus" / number).mkdir(parents=True)
        text = f"Model: \t\t NVIDIA L4\nIRQ:   \t\t 100\nGPU UUID: \t GPU-{number[5:7]}\n"
        (tmp_path / "gpus" / number / "information").write_text(text)
    assert driver_cards(tmp_path) == tuple(Card(f"GPU-{bus}", "NVIDIA L4", "550.54.15") for bus in ("3b", "5e"))
