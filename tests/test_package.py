"""What is installed: exactly the modules of the source tree under one name, and nothing heavy on import."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DATA = {".onnx", ".npz", ".md", ".toml"}


def python(code: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names of the files in the wheel, built from a copy so that no build folder is left in the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    skip = shutil.ignore_patterns("__pycache__")
    for name in ("onnx_lowrank", "passes", "tests"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        return archive.namelist()


def test_the_wheel_holds_every_module_and_nothing_else(wheel: list[str]) -> None:
    engine = [
        path for path in (ROOT / "onnx_lowrank").rglob("*.py") if ROOT / "onnx_lowrank/passes" not in path.parents
    ]
    expected = {path.relative_to(ROOT).as_posix() for path in engine}
    expected |= {f"onnx_lowrank/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "passes").rglob("*.py")}
    assets = (ROOT / "onnx_lowrank/assets").iterdir()
    expected |= {path.relative_to(ROOT).as_posix() for path in assets if path.suffix in DATA}
    expected.add("onnx_lowrank/py.typed")
    found = {name for name in wheel if ".dist-info/" not in name}
    assert len(wheel) == len(set(wheel))
    assert found == expected


def test_the_wheel_carries_the_licence(wheel: list[str]) -> None:
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel)


def test_passes_is_no_module_of_its_own() -> None:
    found = python("import passes")
    assert found.returncode == 1
    assert found.stderr.splitlines()[-1] == (
        "ImportError: got import of 'passes', expected 'onnx_lowrank.passes': import it as onnx_lowrank.passes"
    )


def test_importing_loads_neither_the_trainer_nor_the_command_line() -> None:
    found = python("import sys, onnx_lowrank; print(*sorted({'torch', 'typer', 'sklearn', 'PIL'} & set(sys.modules)))")
    assert (found.returncode, found.stdout.strip()) == (0, ""), found.stderr


def test_every_module_is_importable_without_what_only_posix_has() -> None:
    code = """if True:
        import importlib, os, pkgutil, signal, sys, subprocess
        sys.modules |= dict.fromkeys(["fcntl", "grp", "pwd", "resource", "termios"])
        for name in "fork getuid sched_getaffinity sched_setaffinity SIGALRM SIGKILL alarm".split():
            os.__dict__.pop(name, None), signal.__dict__.pop(name, None)
        import onnx_lowrank
        for found in pkgutil.walk_packages(onnx_lowrank.__path__, "onnx_lowrank."):
            if not found.name.endswith("__main__"):
                importlib.import_module(found.name)
    """
    found = python(code)
    assert found.returncode == 0, found.stderr
