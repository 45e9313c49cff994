"""Benchmarks over threads, batches and levels: every combination once, times led back to the user's layers."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import model, value
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from roads import network, perceptron, save

from onnx_lowrank.cli import run
from onnx_lowrank.errors import InputError
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.kernel_trace import KernelEvent
from onnx_lowrank.passes.factor import Factor
from onnx_lowrank.plan import Choice, Plan
from onnx_lowrank.profile import Sweep, profile
from onnx_lowrank.profile.attribution import attribute, by_layer, by_operator, changes
from onnx_lowrank.profile.memory import MemoryMeter
from onnx_lowrank.profile.sweep import left_open
from onnx_lowrank.signature import TensorSpec
from onnx_lowrank.synthetic import at_batch
from onnx_lowrank.target import ALL_LEVELS, Target

ONE = Target(threads=1, levels=("all",))
BODY = ("body/1", "body/2")


def factored(ir_version: int) -> onnx.ModelProto:
    """The network with the two layers of its body as chains; the first one rewritten twice."""
    proto = network()
    proto.ir_version = ir_version
    graph = Graph(proto)
    for keys in (BODY, ("body/1/svd_0",)):
        Factor(Plan("0" * 64, tuple(Choice(key, key, "svd", (3,)) for key in keys))).run(graph)
    return graph.to_proto()


@given(
    threads=st.lists(st.integers(1, 4), max_size=3),
    batches=st.lists(st.integers(1, 64), max_size=3),
    levels=st.lists(st.sampled_from(ALL_LEVELS), max_size=3),
)
@settings(deadline=None, max_examples=30)
def test_configurations_are_the_product(threads, batches, levels):
    found = Sweep(tuple(threads), tuple(batches), tuple(levels)).configurations(ONE)
    wanted = itertools.product(threads or [1], batches or [None], [(level,) for level in levels] or [("all",)])
    assert [(c.target.threads, c.batch, c.target.levels) for c in found] == list(dict.fromkeys(wanted))


@pytest.mark.parametrize("ir_version", [8, 10])
def test_stages_count_for_the_layer_they_replaced(ir_version):
    graph = factored(ir_version).graph
    names = [node.name for node in graph.node if node.op_type == "Conv"]
    assert "body/1/svd_0/svd_1" in names
    events = [KernelEvent(name, "Conv", "", 10.0, (), ()) for name in names]
    layers = {entry.name: entry.ms for entry in by_layer(attribute(events, graph), graph, len(names))}
    assert layers == pytest.approx({"stem": 1, "body/1": 3, "body/2": 2, "depthwise": 1})


def test_a_users_name_that_looks_like_a_stage_is_kept():
    proto = network()
    proto.graph.node[0].name = "stem/svd_0"
    events = [KernelEvent("stem/svd_0", "Conv", "", 1.0, (), ())]
    assert [entry.name for entry in by_layer(attribute(events, proto.graph), proto.graph, 1)] == ["stem/svd_0"]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0.1, 1e3)), min_size=1, max_size=9))
@settings(deadline=None, max_examples=30)
def test_operators_share_the_whole_run(pairs):
    events = [KernelEvent("n", op, "", spent, (), ()) for op, spent in pairs]
    found = by_operator([*events, KernelEvent("n", "Loop", "", 99.0, (), ())], 5.0)
    assert sum(entry.ms for entry in found) == pytest.approx(5.0)
    assert sorted(entry.share for entry in found)[::-1] == [entry.share for entry in found]
    assert {entry.name for entry in found} == {op for op, _ in pairs}
    assert all(change.faster == 1.0 for change in changes(found, found))


@pytest.mark.parametrize(
    ("provider", "options", "said"),
    [
        ("cuda", {}, "also tries cudnn_conv_algo_search=HEURISTIC and cudnn_conv_algo_search=EXHAUSTIVE, "),
        (
            "cuda",
            {"use_tf32": "0"},
            "also tries cudnn_conv_algo_search=HEURISTIC and cudnn_conv_algo_search=EXHAUSTIVE, ",
        ),
        ("cuda", {"cudnn_conv_algo_search": "DEFAULT"}, ""),
        ("cpu", {}, ""),
    ],
)
def test_options_that_optimize_would_choose_are_told(provider, options, said):
    found = left_open(Target(provider, threads=1, provider_options=options))
    assert said in found
    assert bool(said) is bool(found)


def test_sweep_of_two_models(tmp_path: Path):
    paths = [tmp_path / "before.onnx", tmp_path / "after.onnx"]
    onnx.save(network(), paths[0])
    onnx.save(factored(8), paths[1])
    sweep = Sweep(threads=(1, 2), batches=(1, 3), levels=("extended",))
    result = profile(paths, ONE, budget_s=0.1, sweep=sweep)
    rows = [(row.threads, row.batch, row.level, Path(row.path).name) for row in result.models]
    assert rows == list(itertools.product((1, 2), (1, 3), ("extended",), ("before.onnx", "after.onnx")))
    assert [row.shapes["image"] for row in result.models[:4:2]] == [(1, 3, 16, 16), (3, 3, 16, 16)]
    assert {result.clock} == {row.clock for row in result.models} == {"wall"}  # one column, one clock
    assert [row.race for row in result.models] == [0, 0, 1, 1, 2, 2, 3, 3]
    for row in result.models:
        for parts in (row.layers, row.operators):
            assert sum(part.ms for part in parts) == pytest.approx(row.p50_ms)
    assert [(entry.before, entry.after) for entry in result.comparisons] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    for entry in result.comparisons:
        sides = {change.name: change for change in entry.layers}
        assert all(sides[name].before_ms and sides[name].after_ms for name in BODY)
        assert not any("svd" in name for name in sides)
    raw = json.loads(result.to_json())
    assert raw["schema"] == 1
    assert raw["sweep"] == {"threads": [1, 2], "batch": [1, 3], "levels": ["extended"]}
    assert raw["environment"]["versions"]["onnxruntime"]
    assert {"models", "provider", "threads", "rounds", "disturbed", "synthetic", "notes", "clock"} <= set(raw)


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ([("N", 3)], [(8, 3)]),
        ([(None, 3, "?", "?")], [(8, 3, "?", "?")]),
        ([("?", 3, "?")], [(8, 3, "?")]),
        ([("seq", "batch", 4)], [("seq", 8, 4)]),
        ([("n", "sequence"), (), (2, "n", 128)], [(8, "sequence"), (), (2, 8, 128)]),
        ([(8, 3)], [(8, 3)]),
    ],
)
def test_batch_dimensions(shapes, expected):
    specs = [TensorSpec(f"x{i}", TensorProto.FLOAT, shape) for i, shape in enumerate(shapes)]
    found, given_shapes = at_batch(specs, {"x0": tuple(5 for _ in shapes[0])}, 8, "m.onnx")
    assert [spec.shape for spec in found] == expected
    assert given_shapes["x0"] == tuple(8 if a != b else 5 for a, b in zip(shapes[0], expected[0], strict=True))


def test_no_batch_dimension():
    with pytest.raises(InputError) as caught:
        at_batch([TensorSpec("x", TensorProto.FLOAT, ("seq", 4))], {}, 8, "m.onnx")
    assert str(caught.value) == (
        "got --batch 8 for m.onnx, none of whose inputs has a batch dimension; expected one that has; leave --batch out"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
def test_memory_holds_the_weights_at_least(tmp_path: Path):
    path = tmp_path / "wide.onnx"
    width = 1024
    onnx.save(perceptron(width=width), path)
    with MemoryMeter() as meter:
        feeds = {"x": np.ones((1, width), np.float32)}
        found = meter.peak(path, ONE, "all", feeds)
        refused = meter.peak(path, ONE, "all", {"x": np.ones((1, 3), np.float32)})
        again = meter.peak(path, ONE, "all", feeds)
    weights = 2 * width * width * 4
    for memory in (found, again):
        assert memory.peak_bytes is not None
        assert weights < memory.peak_bytes < 6 * weights
    assert refused.peak_bytes is None
    assert "cannot run on" in refused.reason


WHOLE = "separated by commas; write it like 1,2"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("--threads 1,x", f"got --threads 1,x; expected whole numbers from 0 (all cores) on, {WHOLE}"),
        ("--threads=-1", f"got --threads -1; expected whole numbers from 0 (all cores) on, {WHOLE}"),
        ("--batch 0", f"got --batch 0; expected whole numbers from 1 on, {WHOLE}"),
        ("--batch 1,,8", f"got --batch 1,,8; expected whole numbers from 1 on, {WHOLE}"),
        (
            "--levels all,fast",
            "got --levels all,fast with the unknown level 'fast'; expected levels of none, basic, extended, all, "
            "separated by commas; name some of these",
        ),
        (
            "--batch 4",
            "got --batch 4 for fixed.onnx, whose input 'x' float 2x3 has a fixed batch of 2; expected --batch 2; "
            "export the model with an open batch to time others",
        ),
        (
            "-o fixed.onnx",
            "got fixed.onnx to write to, the same file as fixed.onnx; expected a file of its own; choose another one",
        ),
        (
            "garbage.onnx",
            "got garbage.onnx, which is truncated or not ONNX; expected an ONNX model; export or copy it again",
        ),
    ],
)
def test_refusals(tmp_path: Path, monkeypatch, capsys, options, text):
    monkeypatch.chdir(tmp_path)
    node = helper.make_node("Relu", ["x"], ["y"])
    save(model([node], [value("x", [2, 3])], [value("y", [2, 3])]), tmp_path, "fixed.onnx")
    (tmp_path / "garbage.onnx").write_bytes(b"\xff" * 64)
    assert run(["profile", "fixed.onnx", *options.split()]) == 2
    assert capsys.readouterr().err == f"error: {text}\n"


def test_json_file_and_table(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    save(perceptron(), tmp_path, "model.onnx")
    options = ["--threads", "1", "--batch", "1,2", "--levels", "all", "--seconds", "0.1", "-o", "found.json"]
    assert run(["profile", "model.onnx", "model.onnx", *options]) == 0
    text = capsys.readouterr().out
    raw = json.loads((tmp_path / "found.json").read_text())
    assert [row["batch"] for row in raw["models"]] == [1, 1, 2, 2]
    assert {row["clock"] for row in raw["models"]} == {"cpu"}
    for said in (
        "cpu clock (p95, p99: wall clock)",
        "where the time goes, by layer: batch 1, level all",
        "MatMul",
        "Inputs are synthetic",
        "first",
        "total",
    ):
        assert said in text
    assert text.splitlines()[-1] == "written to found.json"
