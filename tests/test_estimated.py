"""Plans for a device that nobody measured: by estimates that are called so wherever they appear."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from io import StringIO
from pathlib import Path

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table
from roads import network, save

from onnx_lowrank.cli import run
from onnx_lowrank.display import plan_table
from onnx_lowrank.errors import InputError
from onnx_lowrank.graph import io
from onnx_lowrank.latency.child import MeasuringError
from onnx_lowrank.latency.circumstances import Circumstances
from onnx_lowrank.latency.estimates import shipped
from onnx_lowrank.latency.pieces import Job
from onnx_lowrank.latency.roofline import Roofline, read_roofline
from onnx_lowrank.latency.table import CACHE_VARIABLE, LatencyTable, Record
from onnx_lowrank.latency.table_file import sections, to_json
from onnx_lowrank.latency.work import Step, Work, read_work
from onnx_lowrank.plan import ESTIMATED, MEASURED, Choice, Plan
from onnx_lowrank.report.latency_columns import LatencyColumns
from onnx_lowrank.search.estimated import Estimated
from onnx_lowrank.search.racer import Racer, Sample
from onnx_lowrank.search.survey import make_samples, survey
from onnx_lowrank.target import InputShapes, Target

Captured = pytest.CaptureFixture[str]
T4 = shipped()["t4"]
LABEL = "NVIDIA T4 (estimated, not measured: by data sheet and rules of thumb)"
KNOWN = "a10, a100, h100, l4, orin, rtx3090, rtx4090, t4"
SHAPE = "image=64x3x16x16"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a model and an empty latency table of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    save(network(), tmp_path)
    return tmp_path


def columns(table: Table) -> tuple[list[str], list[list[str]]]:
    text = StringIO()
    Console(file=text, width=200, color_system=None).print(table)
    head, *rows = text.getvalue().splitlines()
    return re.split(r"\s{2,}", head.strip()), [re.split(r"\s{2,}", row.strip()) for row in rows]


def test_a_plan_by_estimates_end_to_end(folder: Path, capsys: Captured) -> None:
    code = run(["plan", "model.onnx", "-o", "plan.json", "--estimate", "T4", "--speedup", "1.03", "--shape", SHAPE])
    out = capsys.readouterr().out
    made = Plan.read(folder / "plan.json")
    assert code == 0, out
    assert made.planned_for == LABEL
    assert any(not choice.keeps for choice in made.layers)
    assert {choice.source for choice in made.layers if choice.predicted_ms is not None} == {ESTIMATED}
    told = out.splitlines()
    assert re.fullmatch(rf"[0-9.e-]+ ms estimated, [0-9.]+x as fast as the original, on {re.escape(LABEL)}", told[-1])
    assert "ms (estimated)" in told[1]
    assert "measured" not in out.replace(LABEL, "")
    with LatencyTable() as table:  # nothing was timed, and no estimate was kept as if it had been
        assert len(table) == 0
    assert run(["apply", "model.onnx", "plan.json", "-o", "small.onnx"]) == 0
    assert (folder / "small.onnx").stat().st_size < (folder / "model.onnx").stat().st_size
    assert run(["plan", "model.onnx", "-o", "out_of_reach.json", "--estimate", "t4", "--speedup", "50"]) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--estimate", "gtx9"], f"got --estimate gtx9; expected one of {KNOWN}, or a file;"
         " make one with `onnx-lowrank latency fit`"),
        (["--estimate", "t4", "--device", "x", "--threads", "2"], "got --estimate t4 with --device, --threads; expected"
         " estimates, which know of no measurement, provider or threads; leave one of them out"),
        (["--estimate", "t4", "--table", "table.json"], "got --estimate t4 with --table; expected estimates, which know"
         " of no measurement, provider or threads; leave one of them out"),
        (["--estimate", "t4", "--keep-macs", "0.5"], "got --keep-macs 0.5 for estimates of NVIDIA T4; expected a goal"
         " that time decides; no latency decides a goal of size: leave --table, --device and --estimate out"),
    ],
)  # fmt: skip
def test_what_estimates_cannot_do_is_said(folder: Path, capsys: Captured, options: list[str], message: str) -> None:
    assert run(["plan", "model.onnx", "-o", "plan.json", *options]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert not (folder / "plan.json").exists()


def test_an_estimated_device_is_no_device_of_a_table(folder: Path, capsys: Captured) -> None:
    assert run(["plan", "model.onnx", "-o", "plan.json", "--device", "T4"]) == 2
    command = "onnx-lowrank latency request model.onnx -o request.zip, or plan by estimates: --estimate t4"
    wanted = f"got your latency table with latencies of nothing; expected --device T4; measure it there: {command}"
    assert capsys.readouterr().err == f"error: {wanted}\n"


def test_models_take_what_their_layers_take_and_more(folder: Path) -> None:
    target = Target(threads=1, shapes=(InputShapes({"image": (4, 3, 16, 16)}),))
    path = folder / "model.onnx"
    graph = io.load(path)
    samples, _ = make_samples(graph, target, None, 0)
    device = Estimated(T4)
    racer = device.racer(target, samples, folder, as_float32=False)
    found = survey(graph, racer, folder)
    prices = device.pricer("all").price([Job(layer) for layer in found.layers])
    race = racer.race([racer.best_level(path)] * 2)
    assert 0 < math.fsum(price or 0.0 for price in prices) < race.timings[0].median_ms
    assert race.ratios == (1.0, 1.0)
    twice = device.racer(target, [Sample(s.feeds, 2.0) for s in samples], folder, as_float32=False)
    assert twice.race([racer.best_level(path)]).timings[0].median_ms == pytest.approx(2 * race.timings[0].median_ms)


def test_a_trial_model_that_is_refused_is_a_measurement_that_failed(folder: Path) -> None:
    target = Target(threads=1, shapes=(InputShapes({"image": (1, 3, 16, 16)}),))
    samples, _ = make_samples(io.load(folder / "model.onnx"), target, None, 0)
    racer = Racer(target, samples, folder, seconds=0.1)
    text = '<ir_version: 8, opset_import: ["" : 17, "no.such" : 1]> g (float[1,3,16,16] image) => (float[N] y)'
    onnx.save(onnx.parser.parse_model(text + "{ y = no.such.Op(image) }"), folder / "broken.onnx")
    known = racer.best_level(folder / "model.onnx")
    with pytest.raises(MeasuringError, match=r"refused it \(got .*broken.onnx") as raised:
        racer.trial([known], folder / "broken.onnx")
    assert raised.value.index == 1
    with pytest.raises(InputError):
        racer.best_level(folder / "broken.onnx")


@settings(deadline=None, max_examples=20)
@given(st.lists(st.sampled_from([MEASURED, ESTIMATED]), min_size=1, max_size=6))
def test_measured_and_estimated_never_share_a_column(sources: list[str]) -> None:
    layers = tuple(Choice(f"l{i}", f"l{i}", "svd", (8,), 0.5, i + 1.5, source) for i, source in enumerate(sources))
    head, rows = columns(plan_table(Plan("0" * 64, layers)))
    title = {MEASURED: "ms", ESTIMATED: "ms (estimated)"}
    names = [name for source, name in title.items() if source in sources]
    assert head[4:] == names
    assert [row[4] for row in rows] == [f"{i + 1.5}" for i in range(len(sources))]
    added = LatencyColumns.added_to(Table(), sources)
    for source in sources:
        cells = dict(zip(names, added.cells(source, "x"), strict=True))
        assert cells == {name: "x" if name == title[source] else "" for name in names}


def test_plans_say_what_is_measured(folder: Path) -> None:
    choice = Choice("a", "a", "svd", (8,), 0.5, 1.5, ESTIMATED)
    made = Plan("0" * 64, (choice, dataclasses.replace(choice, key="b", source=MEASURED)))
    assert Plan.from_json(made.to_json()) == made
    raw = json.loads(made.to_json())
    del raw["layers"][0]["source"]  # as earlier versions wrote them
    assert Plan.from_json(json.dumps(raw)).layers[0].source is None
    raw["layers"][0]["source"] = "guessed"
    (folder / "bad.json").write_text(json.dumps(raw))
    with pytest.raises(Exception, match=r"bad field \(ValueError: source 'guessed' of layer a\)"):
        Plan.read(folder / "bad.json")


def machine_table(folder: Path, machine: Roofline, layers: int) -> Path:
    """A table of what a machine would take, with a latency of an earlier version in it."""
    where = dataclasses.replace(Circumstances.here(Target(threads=1)), device="a toaster")
    with LatencyTable.in_memory() as table:
        for i in range(layers):
            width = 32 * (i + 1)
            for chain in ("", *(f": svd 1x{rank}x{width} 1x{width}x{rank}" for rank in (4, 8, 16))):
                words = f"MatMul {width}->{width} at 64x{width} to 64x{width}{chain}"
                work = read_work(words)
                assert work is not None
                table.put(where, Record(words, words, machine.ms(work), 9))
        table.put(where, Record("old", "MatMul 8->8 at 64x8", 1.0, 9))
        path = folder / "table.json"
        path.write_text(to_json(sections(table)))
    return path


def test_a_table_is_fitted_and_planned_by(folder: Path, capsys: Captured) -> None:
    machine_table(folder, T4, 12)
    assert run(["latency", "fit", "table.json", "-o", "toaster.json"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "a toaster, cpu, 1 thread(s)" in told
    assert "48 latencies of 12 layers; of layers held out, half within 0% and nine tenths within 0%" in told
    assert "1 latencies of an earlier version are left out" in told
    assert "channel block of conv, matmul not probed there: 16 is assumed" in told
    found = read_roofline(folder / "toaster.json")
    work = Work("", "float32", (Step(1, 300, 200, (), 64, 64),))
    assert found.ms(work) == pytest.approx(T4.ms(work), rel=0.02)
    assert "(estimated, not measured: fitted to 48 latencies of 12 layers" in found.label
    assert run(["plan", "model.onnx", "-o", "p.json", "--estimate", "toaster.json", "--speedup", "1.02"]) in {0, 3}
    assert Plan.read(folder / "p.json").planned_for == found.label
    capsys.readouterr()
    assert run(["latency", "fit", "table.json", "--json"]) == 0
    raw = json.loads(capsys.readouterr().out)
    assert raw["errors"]["layers"] == 12


def test_nothing_to_fit_to(folder: Path, capsys: Captured) -> None:
    assert run(["latency", "fit"]) == 2
    wanted = "got your latency table with latencies of nothing; expected any latency; measure a model there first"
    assert capsys.readouterr().err == f"error: {wanted}\n"
    machine_table(folder, T4, 3)
    assert run(["latency", "fit", "table.json"]) == 2
    assert "got latencies of 3 layers that say what was timed" in capsys.readouterr().err


def test_estimates_are_listed(folder: Path, capsys: Captured) -> None:
    assert run(["latency", "estimates"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in shipped())
    assert "estimated by data sheet and rules of thumb, not measured" in out
    assert run(["latency", "estimates", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == set(shipped())
