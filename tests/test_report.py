"""The report as text: the same facts at 80 and at 200 columns, and whatever a name looks like."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console
from roads import network, on_one_thread, save

from onnx_lowrank.errors import InputError
from onnx_lowrank.goals import KeepMacs
from onnx_lowrank.pipeline import optimize
from onnx_lowrank.report.memory import peak_rss_mib
from onnx_lowrank.report.model import Accuracy, GoalRow, Report
from onnx_lowrank.report.terminal import show
from onnx_lowrank.search.bisection import Blame

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, quick: None) -> Report:
    folder = tmp_path_factory.mktemp("report")
    return optimize(save(network(), folder), folder / "out.onnx", on_one_thread(KeepMacs(0.5)))[0]


def shown(report: Report, width: int) -> str:
    text = io.StringIO()
    show(report, Console(file=text, width=width, color_system=None))
    return text.getvalue()


def words(text: str) -> str:
    """The text without the line breaks a narrow terminal makes."""
    return re.sub(r"\s+", " ", text)


@pytest.mark.parametrize("width", [80, 200])
def test_it_fits_and_tells_all(report: Report, width: int) -> None:
    text = shown(report, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    flat = words(text)
    for row in report.layers:
        assert row.name in flat
    assert f"goal reached: keep-macs 0.5; {report.goal.reason}" in flat
    assert f"{report.factorized} of {len(report.layers)} weight-bearing nodes factorized" in flat
    assert f"relative error of the outputs {report.fidelity['relative_error']:.3g} on 8 synthetic samples" in flat
    assert f"{report.size.params_before:,}" in flat
    assert f"{report.size.macs_after:,.0f}" in flat
    assert f"{report.size.bytes_after:,}" in flat
    assert all(f"note: {note}" in flat for note in report.notes)


def test_speed_is_shown_with_what_low_rank_has_of_it(report: Report) -> None:
    time = report.latency
    assert time is not None
    text = shown(report, 200)
    for figure in (time.before_ms, time.normalized_ms, time.after_ms, time.predicted_ms):
        assert f"{figure:.3f}" in text
    for ratio, (low, high) in ((time.speedup, time.ci95), (time.low_rank_speedup, time.low_rank_ci95)):
        assert re.search(rf"{ratio:.2f}x\s+{low:.2f} to {high:.2f}", text)


def test_a_missed_goal_a_busy_machine_and_a_blame_are_said(report: Report) -> None:
    assert report.latency is not None
    other = dataclasses.replace(
        report,
        goal=GoalRow("speedup", 3.0, reached=False, reason="1.2x measured"),
        latency=dataclasses.replace(report.latency, disturbed=True),
        bisect=Blame(0.01, "body/2", "svd at rank 8", 0.004, 0.03),
        accuracy=Accuracy("top1", 0.93, 0.925, (-0.01, 0.0), (0.91, 0.95), (0.9, 0.94), 2000),
    )
    text = words(shown(other, 200))
    assert "goal NOT reached: speedup 3; 1.2x measured" in text
    assert "the machine was busy while timing: take the intervals seriously" in text
    assert "bisect: body/2: svd at rank 8 takes the error from 0.004 to 0.03 (tolerance 0.01)" in text
    assert "top1 (2000 samples) 0.9300 0.9250 -0.0050 -0.0100 to +0.0000" in text
    unnamed = dataclasses.replace(report, bisect=Blame(0.01, None, "no rewrite", 0.0, 0.001), latency=None)
    assert "bisect: no rewrite takes the error from 0 to 0.001" in words(shown(unnamed, 200))
    assert "latency (ms" not in shown(unnamed, 200)


def test_names_are_never_read_as_markup(report: Report) -> None:
    rows = tuple(dataclasses.replace(row, name=f"[red]{row.name}[/red]") for row in report.layers)
    text = words(shown(dataclasses.replace(report, layers=rows), 200))
    assert all(row.name in text for row in rows)


def test_a_system_that_does_not_tell_its_peak_memory(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    peak = peak_rss_mib()
    assert peak is not None
    assert peak > 1
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    assert peak_rss_mib() is None
    unknown = dataclasses.replace(report, peak_rss_mib=None)
    assert json.loads(unknown.to_json())["peak_rss_mib"] is None
    assert "peak memory not known" in words(shown(unknown, 200))


def test_json_is_strict_and_complete(report: Report, tmp_path: Path) -> None:
    raw = json.loads(report.to_json())
    assert set(raw) == {field.name for field in dataclasses.fields(Report)}
    assert report.write(tmp_path / "deep" / "folder") == tmp_path / "deep" / "folder" / "report.json"
    broken = dataclasses.replace(report, peak_rss_mib=math.nan)
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        broken.to_json()


def test_a_folder_that_cannot_be_made_is_named(report: Report, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("a file")
    with pytest.raises(InputError) as caught:
        report.write(taken)
    assert str(caught.value) == f"got {taken} (File exists); expected a folder for the report; choose another"
