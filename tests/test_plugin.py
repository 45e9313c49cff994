"""A decomposition of a third party, installed: README's "Add a decomposition", followed to the letter."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builders import run_model, worst_error
from roads import network, save

ROOT = Path(__file__).parent.parent
SECTION = re.compile(r"^## Add a decomposition\n(.*?)^## ", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"`([\w.]+)`[^`]*\n\n```(?:python|toml)\n(.*?)```", re.DOTALL)
QUICK = ("--time-limit", "1")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Followed:
    """What is left when the section's commands have run: the folder, and what each command said."""

    folder: Path
    said: dict[str, str]

    @property
    def report(self) -> dict[str, Any]:
        """report.json."""
        return json.loads((self.folder / "report" / "report.json").read_text())


@pytest.fixture(scope="module")
def section() -> str:
    found = SECTION.search((ROOT / "README.md").read_text("utf-8"))
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def followed(section: str, tmp_path_factory: pytest.TempPathFactory, latencies: Path) -> Followed:
    """The section followed: files written, commands run. pip installs into a folder, and looks nothing up."""
    folder, site = tmp_path_factory.mktemp("plugin"), tmp_path_factory.mktemp("site")
    for name, text in FILE.findall(section):
        (folder / name).write_text(text)
    save(network(32), folder)
    images = np.random.default_rng(0).standard_normal((64, 3, 16, 16)).astype(np.float32)
    np.savez(folder / "data.npz", image=images)
    environment = os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(site), str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "ONNX_LOWRANK_CACHE": str(latencies),
        "COLUMNS": "200",
        "PIP_TARGET": str(site),
        "PIP_NO_DEPS": "1",
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip's way of saying yes
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    said: dict[str, str] = {}
    for commands in (text for language, text in FENCED.findall(section) if not language):
        for line in commands.splitlines():
            # The only liberty: races between models are cut short.
            command = [*shlex.split(line), *(QUICK if " optimize " in line else ())]
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
            said[command[1]] = done.stdout
    return Followed(folder, said)


def test_the_example_is_what_the_readme_prints(section: str) -> None:
    printed = dict(FILE.findall(section))
    example = (ROOT / "tests/example_plugin").glob("*.*")
    assert printed == {path.name: path.read_text("utf-8") for path in example}


def test_it_is_listed(followed: Followed) -> None:
    assert "decoupling" in followed.said["passes"]
    assert "Network decoupling: 1x1 C->r S, r kxk filters on each of S channels." in followed.said["passes"]


def test_it_is_chosen_refitted_and_reported(followed: Followed) -> None:
    report = followed.report
    rows = [row for row in report["layers"] if row["method"] == "decoupling"]
    assert rows
    for row in rows:
        assert row["decision"] == "factorized"
        assert row["macs_after"] < row["macs_before"]
        assert row["latency_ms_after"] > 0
        assert row["error_refit"] is not None
        assert row["error_refit"] < row["error"]
    assert report["goal"]["reached"]


def test_what_it_refuses_is_told(followed: Followed) -> None:
    reasons = {row["name"]: row["reason"] for row in followed.report["layers"]}
    assert reasons["head"] == "32->10 is no two-dimensional convolution of one group"


def test_its_stages_stand_in_the_graph_and_compute_what_was_reported(followed: Followed) -> None:
    small = onnx.load(followed.folder / "small.onnx")
    onnx.checker.check_model(small, full_check=True)
    layer = next(row["name"] for row in followed.report["layers"] if row["method"] == "decoupling")
    names = [node.name for node in small.graph.node]
    assert {f"{layer}/decoupling_0", f"{layer}/decoupling_1"} <= set(names)
    feeds = {"image": np.random.default_rng(1).standard_normal((8, 3, 16, 16)).astype(np.float32)}
    told = followed.report["fidelity"]["relative_error"]
    assert worst_error(run_model(network(32), feeds), run_model(small, feeds)) < 2 * told


def test_apply_gives_the_same_bytes(followed: Followed) -> None:
    small, same = (followed.folder / name for name in ("small.onnx", "same.onnx"))
    assert small.read_bytes() == same.read_bytes()
