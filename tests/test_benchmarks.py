"""The benchmarks' own arithmetic: intervals, result files, the cache of the zoo, the words of a command."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
from builders import conv_model
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from typing_extensions import override

from benchmarks import candidate_table, command, formats, rules
from benchmarks.accuracy import samples
from benchmarks.accuracy.experiment import CLOSED_FORM, Case, measure, record
from benchmarks.accuracy.sweeps import Sweep, fashion
from benchmarks.zoo import results
from benchmarks.zoo.agreement import hits
from benchmarks.zoo.cache import Arrays, load_arrays
from benchmarks.zoo.evaluate import Fidelity, evaluate, paired
from benchmarks.zoo.model import LABEL, SOURCE, Outputs, Scores, ZooModel
from benchmarks.zoo.wordnet import labelled
from onnx_lowrank.catalogue import all_decompositions
from onnx_lowrank.graph.layers import layers
from onnx_lowrank.graph.model import Graph


@dataclass(frozen=True)
class Tiny(ZooModel):
    """A convolution; a sample is right where its largest value is."""

    calibration_samples: ClassVar[int] = 6

    @override
    def export(self, folders: Sequence[Path], target: Path) -> None:
        onnx.save(conv_model(("n", 32, 8, 8), (32, 32, 3, 3), pads=[1, 1, 1, 1]), target)

    @override
    def calibration(self, folders: Sequence[Path], original: Path, samples: int) -> Arrays:
        return {"x": np.random.default_rng(0).normal(size=(samples, 32, 8, 8)).astype(np.float32)}

    @override
    def evaluation(self, folders: Sequence[Path], original: Path) -> Arrays:
        x = np.random.default_rng(1).normal(size=(10, 32, 8, 8)).astype(np.float32)
        return {"x": x, LABEL: np.arange(10) % 2, SOURCE: np.arange(10) // 2}

    @override
    def score(self, outputs: Outputs, reference: Outputs, data: Arrays, folder: Path) -> Scores:
        return {"parity": hits(outputs[0].reshape(len(outputs[0]), -1).argmax(1) % 2 == data[LABEL])}


@dataclass(frozen=True)
class NextTiny(Tiny):
    """The same with other data."""

    edition: ClassVar[int] = 2
    calibration_samples: ClassVar[int] = 9


TINY = Tiny("tiny", "test", (), ("x=1x32x8x8",), batch=4)


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the zoo."""
    monkeypatch.setenv("ONNX_LOWRANK_ZOO", str(tmp_path / "zoo"))
    return tmp_path / "zoo"


def of(right: Sequence[float], before: Sequence[float]) -> NDArray[np.float64]:
    """Sums of a metric that counts hits."""
    return np.stack([right, np.ones(len(right)), before, np.ones(len(right))]).astype(np.float64)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40))
@settings(max_examples=25, deadline=None)
def test_the_drop_is_a_difference_of_means_and_its_interval_holds_it(pairs: list[tuple[bool, bool]]) -> None:
    after, before = zip(*pairs, strict=True)
    found = paired(of(after, before), None, higher_is_better=True)
    assert found.drop == pytest.approx(np.mean(before) - np.mean(after))
    assert found.drop_ci95[0] - 1e-12 <= found.drop <= found.drop_ci95[1] + 1e-12
    assert (found.samples, found.sources) == (len(pairs), len(pairs))
    reversed_sign = paired(of(after, before), None, higher_is_better=False)
    assert reversed_sign.drop == pytest.approx(-found.drop)


def test_copies_of_a_sample_do_not_narrow_the_interval() -> None:
    after, before = [1, 0, 1, 1, 0, 1], [1, 1, 1, 0, 1, 1]
    once = paired(of(after, before), None, higher_is_better=True)
    source = np.repeat(np.arange(6), 50)
    sums = np.repeat(of(after, before), 50, axis=1)
    assert paired(sums, source, higher_is_better=True).drop_ci95 == pytest.approx(once.drop_ci95)
    assert paired(sums, source, higher_is_better=True).sources == 6
    narrow = paired(sums, None, higher_is_better=True).drop_ci95
    assert narrow[1] - narrow[0] < (once.drop_ci95[1] - once.drop_ci95[0]) / 3


def test_samples_without_a_denominator_do_not_count() -> None:
    sums = np.concatenate([of([1, 0], [1, 1]), np.zeros((4, 5))], axis=1)
    found = paired(sums, np.arange(7), higher_is_better=True)
    assert (found.value, found.original, found.samples, found.sources) == (0.5, 1.0, 2, 2)


@given(st.integers(1, 7))
@settings(max_examples=7, deadline=None)
def test_fidelity_does_not_depend_on_the_batch(size: int) -> None:
    rng = np.random.default_rng(0)
    reference, got = rng.normal(size=(7, 3, 2)), rng.normal(size=(7, 3, 2))
    fidelity = Fidelity()
    for start in range(0, 7, size):
        part = slice(start, start + size)
        fidelity.add([got[part]], [reference[part]], len(got[part]))
    row = fidelity.as_row()
    expected = float(np.linalg.norm(got - reference) / np.linalg.norm(reference))
    assert row["relative_error"] == pytest.approx(expected)
    assert row["relative_error_low"] < expected < row["relative_error_high"]
    assert row["samples"] == 7


def test_fidelity_takes_outputs_without_a_batch_axis() -> None:
    fidelity = Fidelity()
    fidelity.add([np.ones((2, 3, 4)), np.ones(3)], [np.ones((2, 3, 4)), np.zeros(3)], 3)
    assert fidelity.as_row()["relative_error"] == pytest.approx(np.sqrt(3 / 24))


def test_evaluate_resamples_sources(zoo: Path) -> None:
    original = TINY.build(zoo)
    found = evaluate(TINY, zoo, original)
    assert (found.metrics["parity"].samples, found.metrics["parity"].sources) == (10, 5)
    assert found.metrics["parity"].drop_ci95 == (0.0, 0.0)
    assert found.fidelity["relative_error_high"] == 0.0


def test_the_cache_is_made_anew_when_the_edition_rises(zoo: Path) -> None:
    path = TINY.build(zoo)
    (path.parent / "edition").unlink()  # as caches were before there were editions
    before = path.stat().st_mtime_ns
    assert TINY.build(zoo) == path
    assert len(load_arrays(path.with_name("calibration.npz"))["x"]) == 6
    raised = NextTiny(TINY.name, TINY.family, TINY.sources, TINY.inputs)
    for _ in range(2):
        assert raised.build(zoo) == path
    assert len(load_arrays(path.with_name("calibration.npz"))["x"]) == 9
    assert path.stat().st_mtime_ns == before, "the model has not changed and is not built again"


def test_a_row_replaces_the_one_with_its_keys(tmp_path: Path) -> None:
    for row in (
        {"model": "a", "goal": 1, "top1": 0.1},
        {"model": "b", "goal": 1},
        {"model": "a", "goal": 1, "top1": 0.2},
    ):
        results.put("found", row, ("model", "goal"), tmp_path)
    where = {"date": results.today(), "cpu": results.cpu(), "tree": results.tree()}
    second, first = {"model": "a", "goal": 1, "top1": 0.2} | where, {"model": "b", "goal": 1} | where
    assert results.recorded("found", tmp_path) == [first, second]
    results.put("found", {**first, "date": "2026-01-01", "cpu": "another"}, ("model", "goal"), tmp_path)
    assert results.recorded("found", tmp_path)[-1] == {**first, "date": "2026-01-01", "cpu": "another"}
    assert results.recorded("missing", tmp_path) == []


def test_tables_leave_out_columns_that_were_not_asked_for() -> None:
    rows: list[results.Row] = [{"a": 1, "b": None, "c": "x|y"}, {"a": 0.123456}]
    assert results.table(rows, ["a", "c"]) == "| a | c |\n|---|---|\n| 1 | x\\|y |\n| 0.1235 |  |"
    assert results.table(rows).startswith("| a | b | c |")


def test_only_calibrated_methods_are_given_data() -> None:
    sweep = fashion(["embedded"])
    found = {case.method: case.arguments(Path("zoo/model.onnx")) for case in sweep.cases([0.5], sweep.methods, 1)}
    shape = ["--shape", "image=1x1x28x28", "--keep-macs", "0.5", "--threads", "1", "--of", "all"]
    labelled = ["--eval", "zoo/evaluation.npz", "--metric", "top1"]
    assert found == {
        "calibrated": [*shape, "--calibration", "zoo/calibration.npz", *labelled],
        "calibrated_closed": [*shape, *CLOSED_FORM, "--calibration", "zoo/calibration.npz", *labelled],
        "energy": [*shape, "--allocator", "energy", *CLOSED_FORM, *labelled],
        "minimax": [*shape, "--allocator", "minimax", *CLOSED_FORM, *labelled],
    }


def test_draws_of_one_size_share_no_sample_and_sizes_are_nested(zoo: Path, tmp_path: Path) -> None:
    setting = samples.Setting(TINY, ("--keep-macs", "0.5"), (), (), "parity")
    arrays: dict[tuple[Any, Any], NDArray[Any]] = {}
    for case in samples.cases(setting, (2, 4), 2, 1, tmp_path):
        if case.calibration is not None:
            arrays[case.keys["samples"], case.keys["draw"]] = load_arrays(case.calibration)["x"]
    # Draws of numpy's normal generator are a sequence: the first samples are those of a smaller draw.
    np.testing.assert_array_equal(arrays[4, 0][:2], arrays[2, 0])
    np.testing.assert_array_equal(arrays[4, 0][2:], arrays[2, 1])
    np.testing.assert_array_equal(np.concatenate([arrays[4, 0], arrays[4, 1]]), TINY.calibration((), Path(), 8)["x"])


def test_small_classes_of_glosses_are_left_out_and_no_gloss_is_in_both_sets(tmp_path: Path) -> None:
    lines = ["  1 licence"]
    for file, glosses in ((3, 4), (5, 9), (6, 12)):
        lines += [
            f'{number:08} {file:02} n 01 word 0 000 | gloss {file} {number}; "an example"' for number in range(glosses)
        ]
    data = tmp_path / "usr/share/wordnet/data.noun"
    data.parent.mkdir(parents=True)
    data.write_text("\n".join(lines))
    for smallest, classes in ((0, 3), (5, 2), (10, 1)):
        train, test = labelled(tmp_path, 2, 2, smallest)
        assert (len(train.texts), len(test.texts), len(set(test.labels))) == (2 * classes, 2 * classes, classes)
        assert not set(train.texts) & set(test.texts)
        assert all("example" not in text for text in train.texts)


@pytest.mark.slow
def test_a_case_through_the_command_line(zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = Sweep((TINY,), "--keep-macs", (0.5,), ("parity",))
    runs = tmp_path / "runs"
    assert record("tiny", sweep.cases((0.5,), ("calibrated",), 1), sweep.columns, runs, tmp_path) == 0
    (row,) = json.loads((tmp_path / "tiny.json").read_text())["rows"]
    assert (row["model"], row["method"], row["goal"], row["exit"]) == ("tiny", "calibrated", "keep-macs 0.5", 0)
    assert row["macs_kept"] <= 0.5
    assert row["evaluation_error"] > 0
    assert row["parity_samples"] == 10
    assert (runs / "tiny_calibrated_keep-macs_0.5" / "out.onnx").is_file()
    assert str(tmp_path) not in (tmp_path / "tiny.json").read_text()
    assert "| tiny | calibrated | keep-macs 0.5 |" in capsys.readouterr().out


def test_a_case_that_fails_keeps_what_was_recorded(zoo: Path, tmp_path: Path) -> None:
    old = {"model": "tiny", "method": "data_free", "goal": "keep-macs 2", "top1": 0.5}
    results.put("tiny", old, ("model",), tmp_path)
    case = Case(TINY, "data_free", ("--keep-macs", "2"))
    assert record("tiny", [case], ("error",), None, tmp_path) == 1
    assert [{key: row[key] for key in old} for row in results.recorded("tiny", tmp_path)] == [old]


def test_formats_are_compared_default_ones_together_and_what_is_recorded_is_skipped(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = list(formats.cases(["embedded"], ("cp_spatial", "svd", "tucker2"), ("--threads", "1"), together=True))
    assert [(case.formats, case.rows) for case in found] == [
        (("svd", "tucker2"), ("svd", "tucker2", "default")),
        (("cp_spatial",), ("cp_spatial",)),
        (("cp_spatial", "svd", "tucker2"), ("cp_spatial", "svd", "tucker2", "all")),
    ]
    case = formats.Case(TINY, ("svd",), "svd", ("--threads", "1"))
    assert case.arguments(Path("zoo/model.onnx")) == [
        *("--shape", "x=1x32x8x8", "--calibration", "zoo/calibration.npz", "--passes", "svd", "--threads", "1")
    ]
    formats.run(case, 0.01, folder=tmp_path)
    rows = results.recorded("formats", tmp_path)
    assert [(row["goal"], row["reached"], row["reason"]) for row in rows] == [
        (goal, False, "no result within 0 s") for goal in formats.GOALS
    ]
    formats.run(case, 0.01, folder=tmp_path)
    assert capsys.readouterr().out == "tiny svd: no result within 0 s\n"
    for words, limit, again in (("--threads 1", 1.0, False), ("--threads 1", 0.01, True), ("--threads 2", 0.01, False)):
        formats.run(replace(case, options=tuple(words.split())), limit, again=again, folder=tmp_path)
        assert capsys.readouterr().out.startswith("tiny svd: no result within ")
    rows = results.recorded("formats", tmp_path)
    assert [(row["options"], row["reason"]) for row in rows] == [
        (words, "no result within 0 s") for words in ("--threads 1", "--threads 2") for _ in formats.GOALS
    ]


def test_rules_are_run_once_on_measurements_of_the_default_and_alds_on_slices(zoo: Path, tmp_path: Path) -> None:
    goals = [("--keep-macs", 0.5)]
    wanted = list(rules.cases("embedded", goals, ["alds", "vbmf"], 1, tmp_path / "warm"))
    assert [case.keys for case in wanted] == [
        {"rule": "alds", "formats": "svd,grouped_svd", "threads": 1},
        {"rule": "alds", "formats": "default,grouped_svd", "threads": 1},
        {"rule": "vbmf", "formats": "default", "threads": 1},
    ]
    assert all("grouped_svd" in case.options[-1] for case in wanted[:2])
    assert rules.missing(wanted, tmp_path) == wanted
    results.put("rules", {**wanted[0].columns, **wanted[0].keys}, ("rule",), tmp_path)
    assert rules.missing(wanted, tmp_path) == wanted[1:]
    assert rules.missing(rules.cases("embedded", goals, ["alds"], 2, None), tmp_path)


def test_a_run_leaves_the_measurements_it_began_with_alone(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "warm").mkdir()
    (tmp_path / "warm" / "old").touch()
    seen: list[list[str]] = []

    def optimize(model: Path, out: Path, words: Sequence[str], variables: Mapping[str, str]) -> command.Run:
        own = Path(variables["ONNX_LOWRANK_CACHE"])
        seen.append([path.name for path in own.iterdir()])
        (own / "new").touch()
        return command.Run(out, 4, 0.0, "nothing", {})

    monkeypatch.setattr(command, "optimize", optimize)
    case = Case(TINY, "data_free", ("--keep-macs", "0.5"), warm=tmp_path / "warm")
    assert [measure(case)["error"], measure(case)["error"]] == ["nothing"] * 2
    assert seen == [["old"], ["old"]]


@pytest.mark.slow
def test_a_comparison_through_the_command_line(zoo: Path, tmp_path: Path) -> None:
    words = ("--threads", "1", "--keep-macs", "0.5", "--speedup", "2")
    formats.run(formats.Case(TINY, ("svd",), "svd", words), 600, folder=tmp_path)
    half, _ = results.recorded("formats", tmp_path)
    assert (half["model"], half["formats"], half["goal"], half["reached"]) == ("tiny", "svd", "keep-macs 0.5", True)
    assert float(str(half["macs_kept"])) <= 0.5
    assert half["parity_samples"] == 10
    rows = results.recorded("formats_layers", tmp_path)
    assert {row["layer"] for row in rows} == {"conv"}
    assert str(tmp_path) not in (tmp_path / "formats.json").read_text()


def test_the_candidate_table_and_the_svds_of_its_unfoldings(tmp_path: Path) -> None:
    path, shapes = tmp_path / "model.onnx", {"x": (1, 16, 8, 8)}
    onnx.save(conv_model((1, 16, 8, 8), (24, 16, 3, 3), pads=[1] * 4), path)
    (layer,) = layers(Graph(onnx.load(path)))[0]
    found = candidate_table.unfoldings(layer, candidate_table.closed_forms())
    expected = [(1, 24, 144), (1, 216, 16), (1, 72, 48), (1, 72, 48), *((k, 24, 144 // k) for k in (2, 4, 8, 16))]
    assert Counter(expected) <= Counter(matrix.shape for matrix in found)
    energy = float(np.linalg.norm(layer.read()))
    assert all(np.linalg.norm(matrix) == pytest.approx(energy) for matrix in found)
    seconds, count, peak = candidate_table.bare(path, shapes)
    assert (count, seconds > 0, peak > 1) == (len(found), True, True)
    assert candidate_table.table(path, shapes, "all")[1] > 5
    assert set(candidate_table.ITERATIVE) < set(all_decompositions())
