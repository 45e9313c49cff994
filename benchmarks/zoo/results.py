"""Benchmark results as JSON files in `benchmarks/results`, and the markdown tables rendered from them.

A file holds `date`, `cpu` and `versions` of when it was last written, and `rows`, a list of flat rows of scalars; rows
that were put into it one by one hold the date, the processor they were measured on and the commit of the code (`tree`).
"""

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeAlias

from benchmarks.zoo.cache import appearing_whole

Scalar: TypeAlias = str | int | float | bool | None
Row: TypeAlias = Mapping[str, Scalar]

FOLDER = Path(__file__).resolve().parent.parent / "results"
PACKAGES = ("onnx-lowrank", "onnx", "onnxruntime-gpu", "onnxruntime", "numpy", "scipy", "torch")


def write(name: str, rows: Sequence[Row], folder: Path = FOLDER) -> Path:
    """Write `<name>.json` with the rows, today's date, the processor and the package versions."""
    path = folder / f"{name}.json"
    record = {
        "date": today(),
        "cpu": cpu(),
        "versions": {"python": platform.python_version()} | versions(),
        "rows": [dict(row) for row in rows],
    }
    with appearing_whole(path) as partial:
        partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def recorded(name: str, folder: Path = FOLDER) -> list[Row]:
    """The rows of `<name>.json`; none if there is no such file."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text("utf-8"))["rows"] if path.is_file() else []


def put(name: str, row: Row, keys: Sequence[str], folder: Path = FOLDER) -> Path:
    """Write `<name>.json` with a row more, dated; a row that agrees with it in `keys` gives way to it."""
    row = {**row, **{key: row.get(key) or of() for key, of in (("date", today), ("cpu", cpu), ("tree", tree))}}
    others = (old for old in recorded(name, folder) if any(old.get(key) != row.get(key) for key in keys))
    return write(name, [*others, row], folder)


def table(rows: Sequence[Row], columns: Sequence[str] | None = None) -> str:
    """Rows as a markdown table; columns in order of appearance by default."""
    named = list(dict.fromkeys(key for row in rows for key in row)) if columns is None else list(columns)
    lines = ["| " + " | ".join(named) + " |", "|" + "---|" * len(named)]
    lines += ["| " + " | ".join(_cell(row.get(column)) for column in named) + " |" for row in rows]
    return "\n".join(lines)


def render(folder: Path = FOLDER) -> str:
    """Every result file as a markdown section with its table."""
    sections = [_section(path.stem, json.loads(path.read_text("utf-8"))) for path in sorted(folder.glob("*.json"))]
    return "\n\n".join(sections) if sections else "No results yet."


def today() -> str:
    """The date, in UTC."""
    return datetime.now(UTC).date().isoformat()


def cpu() -> str:
    """The processor's model name."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@cache
def tree() -> str:
    """The commit of the code that runs; empty outside of a repository."""
    words = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def versions() -> dict[str, str]:
    """Versions of the packages that matter, where installed."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _section(title: str, record: Mapping[str, object]) -> str:
    rows = record.get("rows")
    assert isinstance(rows, list), f"{title}.json: got no list under `rows`; write it with results.write"
    environment = record.get("versions")
    packages = ", ".join(f"{k} {v}" for k, v in environment.items()) if isinstance(environment, dict) else ""
    return f"### {title}\n\n{record.get('date')}, {record.get('cpu')}; {packages}\n\n{table(rows)}"


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "\\|")
