"""NVIDIA cards, and which of them a session runs on. Like `machine`, part of the script that `latency request` writes.

CUDA numbers the cards that CUDA_VISIBLE_DEVICES leaves, in its order; without it fastest first, while nvidia-smi and
the driver list them by bus. Which card a number means can therefore be told where all are alike, where it is named by
UUID, or where CUDA_DEVICE_ORDER is PCI_BUS_ID.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Card:
    """One of them."""

    uuid: str
    name: str
    driver: str

    def __str__(self) -> str:
        return f"{self.name}, {self.driver}" if self.driver else self.name


def accelerator() -> str:
    """Name and driver of all NVIDIA cards, or an empty string."""
    return "; ".join(map(str, _cards()))


def selected(number: str) -> str:
    """Name and driver of the card that CUDA gives this number, in this environment."""
    order = os.environ.get("CUDA_DEVICE_ORDER", "")
    return chosen(_cards(), number, os.environ.get("CUDA_VISIBLE_DEVICES"), by_bus=order == "PCI_BUS_ID")


def chosen(cards: Sequence[Card], number: str, visible: str | None, *, by_bus: bool = False) -> str:
    """The card that CUDA gives a number, in words.

    Args:
        cards: All there are, by bus.
        number: Of the device, as the provider is told it.
        visible: CUDA_VISIBLE_DEVICES: numbers or beginnings of UUIDs.
        by_bus: Whether CUDA numbers by bus, too.

    Returns:
        Its name and driver; where cards differ and it cannot be told which is meant, all of them and what was said.
    """
    names = [str(index) for index in range(len(cards))] if visible is None else visible.split(",")
    name = names[int(number)].strip() if number.isdecimal() and int(number) < len(names) else ""
    if name.isdecimal():
        found = list(cards[int(name) : int(name) + 1]) if by_bus or len(set(map(str, cards))) == 1 else []
    else:
        found = [card for card in cards if name and card.uuid.startswith(name)]
    if len(found) == 1 or not cards:
        return "".join(map(str, found))
    said = f"device {number}" + ("" if visible is None else f" of CUDA_VISIBLE_DEVICES={visible}")
    return f"{'; '.join(map(str, cards))}, {said}"


@functools.cache
def _cards() -> tuple[Card, ...]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return driver_cards()
    query = [tool, "--query-gpu=uuid,name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)  # noqa: S603 - fixed words
    except (OSError, subprocess.TimeoutExpired):
        return driver_cards()
    return listed_cards(answer.stdout) if answer.returncode == 0 else driver_cards()


def listed_cards(answer: str) -> tuple[Card, ...]:
    """The cards in an answer of nvidia-smi: a line of UUID, name and driver version for each."""
    rows = [[part.strip() for part in line.split(",")] for line in answer.splitlines()]
    return tuple(Card(row[0], ", ".join(row[1:-1]), row[-1]) for row in rows if len(row) > 2)


def driver_cards(root: Path = Path("/proc/driver/nvidia")) -> tuple[Card, ...]:
    """The cards as the Linux driver tells them: containers may lack nvidia-smi."""
    try:
        driver = re.search(r"Module\s+(\d[\d.]+)", (root / "version").read_text())
        texts = [path.read_text() for path in sorted(root.glob("gpus/*/information"))]
    except OSError:
        return ()
    rows = [{key.strip(): value.strip() for key, _, value in (x.partition(":") for x in t.splitlines())} for t in texts]
    version = driver[1] if driver else ""
    return tuple(Card(row.get("GPU UUID", ""), row["Model"], version) for row in rows if row.get("Model"))
