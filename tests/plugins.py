"""Packages of third parties, as pip would leave them in a folder."""

from __future__ import annotations

from pathlib import Path

from onnx_lowrank import catalogue


def install(folder: Path) -> Path:
    """An empty module in a package of its own with an entry point; its source file."""
    source = folder / f"lowrank_plugin_{folder.name}.py"
    info = source.with_name(f"{source.stem}-1.0.dist-info")
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {source.stem}\nVersion: 1.0\n")
    announce(source)
    return source


def announce(source: Path, attribute: str = "") -> None:
    """Write the entry point: the module, or what is in it."""
    info = source.with_name(f"{source.stem}-1.0.dist-info")
    (info / "entry_points.txt").write_text(f"[{catalogue.GROUP}]\nmine = {source.stem}{attribute}\n")
