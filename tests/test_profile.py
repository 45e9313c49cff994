"""Profiles compare files in turns and give every microsecond an owner."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from builders import model, value
from onnx import ModelProto, helper
from rich.console import Console

from onnx_lowrank.errors import InputError
from onnx_lowrank.kernel_trace import KernelEvent
from onnx_lowrank.profile import Profile, profile, render
from onnx_lowrank.profile.attribution import RUNTIME, attribute, name_nodes
from onnx_lowrank.profile.benchmark import percentile
from onnx_lowrank.target import InputShapes, Target


def network(named: bool = True) -> ModelProto:
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["c0"], name="first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c0"], ["r0"], name="act"),
        helper.make_node("Conv", ["r0", "w1"], ["c1"], name="second", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c1", "r0"], ["a"], name="sum"),
        helper.make_node("Relu", ["a"], ["y"], name="last"),
    ]
    for node in nodes:
        node.name = node.name if named else ""
    weights = {f"w{i}": rng.standard_normal((32, 32, 3, 3)).astype(np.float32) for i in range(2)}
    return model(nodes, [value("x", ["n", 32, 16, 16])], [value("y", ["n", 32, 16, 16])], weights)


def event(node: str, op: str, microseconds: float = 1.0) -> KernelEvent:
    return KernelEvent(node, op, "CPUExecutionProvider", microseconds, (), ())


def rendered(result: Profile) -> str:
    console = Console(width=160)
    with console.capture() as captured:
        render(result, console)
    return captured.get()


def test_kernels_find_their_nodes():
    graph = network().graph
    events = [
        event("r0_nchwc", "Conv", 50),
        event("y_nchwc", "Conv", 30),
        event("act", "Relu", 10),
        event("ReorderOutput_token_3", "ReorderOutput", 6),
        event("second/Something_7", "FusedConv", 4),
        event("some_loop", "Loop", 1000),
    ]
    shares = {entry.node: (entry.share, entry.ops) for entry in attribute(events, graph)}
    assert shares == {
        "first": (0.5, ("Conv",)),
        "second": (0.34, ("Conv", "FusedConv")),
        "act": (0.1, ("Relu",)),
        RUNTIME: (0.06, ("ReorderOutput",)),
    }


def test_longer_names_win_over_their_prefixes():
    graph = network().graph
    graph.node[0].name, graph.node[2].name = "conv", "conv_2"
    assert [entry.node for entry in attribute([event("conv_2_nchwc", "Conv")], graph)] == ["conv_2"]
    assert [entry.node for entry in attribute([event("conv_9", "Conv")], graph)] == ["conv"]
    assert [entry.node for entry in attribute([event("convolution", "Conv")], graph)] == [RUNTIME]


def test_nodes_without_name_are_named_after_their_output():
    graph = network(named=False).graph
    name_nodes(graph)
    assert [node.name for node in graph.node] == ["c0", "r0", "c1", "a", "y"]


@pytest.mark.parametrize("named", [True, False])
def test_profile_of_two_files(tmp_path: Path, named):
    paths = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    onnx.save(network(named), paths[0])
    onnx.save(network(named), paths[1], save_as_external_data=True, location="b.data", size_threshold=0)
    result = profile(paths, Target(threads=1), budget_s=0.3)
    first, second = result.models
    assert first.ratio == 1.0
    assert second.ratio_ci95[0] <= second.ratio <= second.ratio_ci95[1]
    assert first.p95_ms is not None
    assert first.p99_ms is not None
    assert first.p50_ms <= first.p95_ms <= first.p99_ms
    assert first.p50_ci95_ms[0] <= first.p50_ms <= first.p50_ci95_ms[1]
    assert first.throughput == pytest.approx(1e3 * first.batch / first.p50_ms)
    assert first.size_bytes == paths[0].stat().st_size
    assert second.size_bytes == paths[1].stat().st_size + (tmp_path / "b.data").stat().st_size
    convs = {"first", "second"} if named else {"c0", "c1"}
    assert convs <= {entry.node for entry in first.nodes}
    assert sum(entry.share for entry in first.nodes) == pytest.approx(1.0)
    assert result.synthetic
    assert any("--shape x=" in note for note in result.notes)
    assert json.loads(json.dumps(result.to_dict()))["models"][0]["level"] in {"all", "extended"}


def test_few_runs_have_no_tail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [percentile(range(count), 0.95) for count in (1, 19, 21)] == [None, None, 19.0]
    path = tmp_path / "a.onnx"
    onnx.save(network(), path)
    monkeypatch.setattr("onnx_lowrank.latency.race.LARGE_BYTES", 0)  # three runs in a round, for five rounds at least
    (row,) = profile([path], Target(threads=1, levels=("all",)), budget_s=0.1).models
    assert row.runs % 3 == 0
    assert row.runs >= 15
    assert (row.p95_ms is None) is (row.p99_ms is None) is (row.runs < 20)


def test_missing_tails_are_null_and_said(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    onnx.save(network(), path)
    found = profile([path], Target(threads=1, levels=("all",)), budget_s=0.1)
    rows = tuple(replace(row, p95_ms=None, p99_ms=None, runs=15) for row in found.models)
    few = replace(found, models=rows)
    assert [json.loads(few.to_json())["models"][0][key] for key in ("p95_ms", "p99_ms", "runs")] == [None, None, 15]
    assert rendered(few).count("not enough runs") == 2
    assert "Of 15 runs there is no p95 or p99; --seconds gives more." in rendered(few)


def test_runs_are_counted_not_rounds(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    onnx.save(network(), path)
    found = profile([path], Target(threads=1, levels=("all",)), budget_s=0.1)
    for runs, rounds, said in ((99, 200, True), (100, 9, False)):
        result = replace(found, rounds=rounds, models=tuple(replace(row, runs=runs) for row in found.models))
        assert (f"Of {runs} runs there is a p99 close to the slowest one; " in rendered(result)) is said
        assert ("close to the slowest" in rendered(result)) is said


def test_rendered_table_says_what_was_compared(tmp_path: Path):
    path = tmp_path / "a.onnx"
    onnx.save(network(), path)
    feeds = {"x": np.ones((2, 32, 16, 16), np.float32)}
    result = profile([path, path], Target(threads=1, levels=("all",)), feeds, budget_s=0.1)
    text = rendered(result)
    assert "1 thread(s)" in text
    assert text.count("a.onnx") == 8  # twice in each table
    assert "1.00x [1.00, 1.00]" in text
    assert "peak host MB" in text
    assert "synthetic" not in text
    assert f"onnxruntime {onnxruntime.__version__}, provider cpu (provider defaults)" in text


def test_every_set_of_shapes_is_profiled(tmp_path: Path):
    paths = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    for path in paths:
        onnx.save(network(), path)
    small, large = (1, 32, 16, 16), (8, 32, 16, 16)
    target = Target(threads=1, shapes=(InputShapes({"x": small}, 0.9), InputShapes({"x": large}, 0.1)))
    result = profile(paths, target, budget_s=0.2)
    assert [(Path(m.path).name, m.shapes["x"]) for m in result.models] == [
        ("a.onnx", small),
        ("b.onnx", small),
        ("a.onnx", large),
        ("b.onnx", large),
    ]
    assert len({(m.path, m.level) for m in result.models}) == 2
    assert [m.ratio for m in result.models[::2]] == [1.0, 1.0]
    tables = rendered(result).partition("Timed on")[0]
    assert tables.count("x=8x32x16x16") == 4
    assert tables.count("x=1x32x16x16") == 6  # the first race's breakdowns too
    assert "cpu clock" in tables


def test_nothing_to_profile():
    with pytest.raises(InputError, match=r"^got no model; expected at least one ONNX file; name one$"):
        profile([], Target(threads=1))
