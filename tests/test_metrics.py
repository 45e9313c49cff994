"""Task metrics, intervals, and the distances between outputs, against definitions written in another way."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from onnx_lowrank.errors import InputError
from onnx_lowrank.fidelity import FidelityMeter, OutputFidelity, relative_error
from onnx_lowrank.metrics import (
    bootstrap_mean,
    cosine,
    estimate,
    metric_named,
    mse,
    paired_difference,
    top1,
    top5,
    wilson,
)

RNG = np.random.default_rng(0)


def one(reference: np.ndarray, candidate: np.ndarray, name: str = "y", logits: Sequence[str] = ()) -> OutputFidelity:
    meter = FidelityMeter(logits)
    meter.update({name: reference}, {name: candidate}, len(reference) if reference.ndim else 1)
    return meter.result()[0]


def test_top_k() -> None:
    output = np.array([[0.1, 0.9, 0, 0, 0, 0], [6, 5, 4, 3, 2, 1], [1, 2, 3, 4, 5, 6]])
    labels = np.array([1, 5, 1])
    assert top1(output, labels).tolist() == [1, 0, 0]
    assert top5(output, labels).tolist() == [1, 0, 1]


def test_mse_and_cosine_are_better_when_higher() -> None:
    labels = RNG.standard_normal((5, 3, 2))
    near, far = labels + 0.1, labels + 1
    assert (mse(near, labels) > mse(far, labels)).all()
    assert mse(near, labels) == pytest.approx(-0.01)
    assert cosine(labels * 3, labels) == pytest.approx(1)
    assert cosine(-labels, labels) == pytest.approx(-1)


@pytest.mark.parametrize(
    ("name", "labels", "text"),
    [
        ("top1", np.array([0.5, 1]), "one class number per sample and an output (samples, classes)"),
        ("top1", np.array([0, 3]), "got labels from 0 to 3 for 3 classes; expected class numbers counted from 0"),
        (
            "mse",
            np.array([0, 1]),
            "got labels int64 (2,) for an output (2, 3); expected numbers shaped like the output",
        ),
    ],
)
def test_labels_that_do_not_fit(name: str, labels: np.ndarray, text: str) -> None:
    with pytest.raises(InputError) as caught:
        metric_named(name)({"y": np.ones((2, 3))}, labels)
    assert text in str(caught.value)


def test_unknown_metric() -> None:
    with pytest.raises(InputError) as caught:
        metric_named("f1")
    assert (
        str(caught.value)
        == "got --metric f1; expected one of top1, top5, mse, cosine, or module:function; name one of these"
    )


def test_the_output_that_is_scored() -> None:
    outputs = {"a": np.array([[0.0, 1.0]]), "b": np.array([[1.0, 0.0]])}
    assert metric_named("top1")(outputs, np.array([1])).tolist() == [1]
    assert metric_named("top1", "b")(outputs, np.array([1])).tolist() == [0]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Writes the module `mine` into the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return lambda text: void(Path("mine.py").write_text("import numpy as np\n" + text))


def void(_: object) -> None:
    """Drop a value."""


def test_a_metric_of_the_users_own(module: Callable[[str], None]) -> None:
    module("def score(outputs, labels): return (outputs['b'].sum(1) > 0) == (labels == 'yes')")
    outputs = {"a": np.zeros((3, 2)), "b": np.array([[1.0], [-1.0], [2.0]])}
    scores = metric_named("mine:score")(outputs, np.array(["yes", "yes", "no"]))
    assert (scores.dtype, scores.tolist()) == (np.float64, [1, 0, 0])


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (
            "return outputs['z']",
            "--metric mine:score, which failed (KeyError: 'z'); expected a function of (outputs, labels); mend it",
        ),
        (
            "return 1.0",
            "scores float64 () of --metric mine:score for 2 samples; expected numbers (2,); return one per sample",
        ),
        (
            "return np.ones((2, 1))",
            "scores float64 (2, 1) of --metric mine:score for 2 samples; expected numbers (2,); return one per sample",
        ),
        (
            "return ['a', 'b']",
            "scores <U1 (2,) of --metric mine:score for 2 samples; expected numbers (2,); return one per sample",
        ),
        (
            "return [1.0, np.nan]",
            "1 NaN or infinite scores of --metric mine:score; expected finite numbers; mend the function",
        ),
    ],
)
def test_what_a_metric_may_not_return(module: Callable[[str], None], body: str, text: str) -> None:
    module(f"def score(outputs, labels): {body}")
    with pytest.raises(InputError) as caught:
        metric_named("mine:score")({"y": np.ones((2, 3))}, np.arange(2))
    assert str(caught.value) == f"got {text}"


@given(st.integers(1, 500), st.floats(0, 1))
@settings(deadline=None, max_examples=40)
def test_wilson_is_scipys(count: int, share: float) -> None:
    successes = round(share * count)
    expected = stats.binomtest(successes, count).proportion_ci(0.95, "wilson")
    found = wilson(successes, count)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_bootstrap_covers_the_mean_as_often_as_it_says() -> None:
    hits = 0
    for seed in range(60):
        values = np.random.default_rng(seed).exponential(size=80)
        interval = bootstrap_mean(values, seed)
        hits += interval.low <= 1.0 <= interval.high
    assert hits >= 48  # 95 % of 60 is 57; 48 has a probability below 1e-3


def test_estimates_choose_their_interval_and_are_seeded() -> None:
    shares = np.array([1.0] * 90 + [0.0] * 10)
    assert estimate(shares, 0) == wilson(90, 100)
    assert str(wilson(90, 100)) == "0.9 [0.8256, 0.9448]"
    assert wilson(90, 100).to_dict()["samples"] == 100
    values = RNG.standard_normal(50)
    assert estimate(values, 1) == bootstrap_mean(values, 1)
    assert bootstrap_mean(values, 1) != bootstrap_mean(values, 2)


def test_pairing_narrows_the_interval_of_a_difference() -> None:
    before = RNG.standard_normal(200) * 10
    found = paired_difference(before, before + 0.5 + 0.01 * RNG.standard_normal(200), seed=0)
    assert found.low < 0.5 < found.high
    assert found.high - found.low < 0.01


@pytest.mark.parametrize("metric", [top1, top5, mse, cosine])
def test_what_is_no_number_has_no_score(metric: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
    output = RNG.standard_normal((3, 6))
    output[0] = np.nan
    output[1, 2] = np.nan
    labels = np.zeros(3, np.int64) if metric in {top1, top5} else RNG.standard_normal((3, 6))
    assert np.isnan(metric(output, labels)).tolist() == [True, True, False]
    masked = np.where(np.arange(6) > 3, -np.inf, RNG.standard_normal((3, 6)))
    assert metric not in {top1, top5} or np.isfinite(metric(masked, labels)).all()


def test_intervals_draw_whole_sources() -> None:
    rng = np.random.default_rng(0)
    widths: list[float] = []
    hits = 0
    for seed in range(40):
        means = rng.standard_normal(30)
        values, sources = (
            np.repeat(means, 20) + 0.01 * rng.standard_normal(600),
            np.repeat(np.arange(30).astype(str), 20),
        )
        found = bootstrap_mean(values, seed, sources)
        hits += found.low <= 0 <= found.high
        widths.append(found.high - found.low)
        assert found.samples == 600
    assert hits >= 33  # 95 % of 40 is 38; 33 has a probability below 0.02
    assert np.mean(widths) == pytest.approx(2 * 1.96 / 30**0.5, rel=0.15)  # of 30 independent values, not of 600
    values = rng.standard_normal(50)
    for alone in (np.full(50, "one"), np.arange(50).astype(str)):
        assert bootstrap_mean(values, 0, alone) == bootstrap_mean(values, 0)


def test_shares_of_sources() -> None:
    sources = np.repeat(list("abcdefgh"), 25)
    shares = np.repeat([1.0, 1, 1, 0, 1, 0, 1, 1], 25)
    assert estimate(shares, 0, sources) == bootstrap_mean(shares, 0, sources)
    assert estimate(shares, 0) == wilson(150, 200)
    alike = estimate(np.ones(200), 0, sources)
    assert (alike.low, alike.high, alike.samples) == (wilson(8, 8).low, 1.0, 200)


def test_no_change_seen_is_no_proof_of_none() -> None:
    scores = np.array([1.0] * 90 + [0.0] * 10)
    found = paired_difference(scores, scores, 0)
    bound = stats.binomtest(0, 100).proportion_ci(0.95, "exact").high
    assert (found.value, found.low, found.high) == (0.0, pytest.approx(-bound), pytest.approx(bound))
    by_source = paired_difference(scores, scores, 0, np.repeat(np.arange(10), 10).astype(str))
    assert by_source.high == pytest.approx(stats.binomtest(0, 10).proportion_ci(0.95, "exact").high)
    changed = scores.copy()
    changed[0] = 0.0
    assert paired_difference(scores, changed, 0).low < -0.01 < 0.0
    graded = RNG.standard_normal(9)
    assert paired_difference(graded, graded, 0).high == 0.0


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 5))
def test_batches_do_not_change_the_distances(seed: int, samples: int, batch: int) -> None:
    rng = np.random.default_rng(seed)
    reference = rng.standard_normal((samples, 3, 4)).astype(np.float32)
    candidate = (reference + 0.1 * rng.standard_normal(reference.shape)).astype(np.float32)
    meter = FidelityMeter()
    for start in range(0, samples, batch):
        part = slice(start, start + batch)
        meter.update({"y": reference[part]}, {"y": candidate[part]}, len(reference[part]))
    found = meter.result()[0]
    before, after = reference.astype(np.float64), candidate.astype(np.float64)
    per_sample = [np.linalg.norm(b - a) / np.linalg.norm(b) for b, a in zip(before, after, strict=True)]
    assert found.samples == samples
    assert found.relative == pytest.approx(np.linalg.norm(after - before) / np.linalg.norm(before))
    assert meter.relative_error == pytest.approx(found.relative)
    assert found.max_absolute == pytest.approx(np.abs(after - before).max())
    assert found.mean_absolute == pytest.approx(np.abs(after - before).mean())
    flat = (before.ravel(), after.ravel())
    assert found.cosine == pytest.approx(np.dot(*flat) / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1]))
    assert found.percentiles["50"] == pytest.approx(np.median(per_sample))
    assert found.percentiles["100"] == pytest.approx(max(per_sample))


def test_probabilities_get_kl_and_agreement() -> None:
    p, q = special.softmax(RNG.standard_normal((2, 20, 5)), axis=-1)
    found = one(p, q)
    assert found.kind == "probabilities"
    assert found.kl == pytest.approx(stats.entropy(p, q, axis=1).mean())
    assert found.top1_agreement == np.mean(p.argmax(1) == q.argmax(1))


@pytest.mark.parametrize(("name", "logits"), [("logits", []), ("y", ["y"])])
def test_logits_are_known_by_name_or_by_the_caller(name: str, logits: list[str]) -> None:
    reference = RNG.standard_normal((8, 5))
    candidate = reference + 0.1
    candidate[:, 0] += 1
    found = one(reference, candidate, name, logits)
    expected = stats.entropy(special.softmax(reference, axis=1), special.softmax(candidate, axis=1), axis=1).mean()
    assert found.kind == "logits"
    assert found.kl == pytest.approx(expected)


def test_other_matrices_are_scores_and_the_rest_are_values() -> None:
    scores = one(np.array([[1.0, 5.0], [3.0, 2.0]]), np.array([[1.0, 5.0], [2.0, 3.0]]))
    assert (scores.kind, scores.kl, scores.top1_agreement) == ("scores", None, 0.5)
    image = one(RNG.standard_normal((2, 3, 4, 4)), np.zeros((2, 3, 4, 4)))
    assert (image.kind, image.kl, image.top1_agreement, image.relative) == ("values", None, None, pytest.approx(1.0))


def test_rows_that_are_no_distribution_take_the_kl_away() -> None:
    meter = FidelityMeter()
    for rows in (np.array([[0.5, 0.5]]), np.array([[2.0, 0.5]])):
        meter.update({"y": rows}, {"y": rows}, 1)
    assert (meter.result()[0].kind, meter.result()[0].kl) == ("scores", None)


def test_equal_outputs_have_no_distance() -> None:
    for array in (np.zeros((2, 3)), RNG.standard_normal((2, 3)), np.array(4.0), np.arange(6), np.array(["a", "b"])):
        found = one(array, array)
        assert (found.relative, found.max_absolute, found.cosine) == (0.0, 0.0, pytest.approx(1.0))


def test_strings_count_by_how_many_differ() -> None:
    assert one(np.array(["a", "b", "c", "d"]), np.array(["a", "b", "c", "x"])).relative == pytest.approx(0.5)


def test_another_shape_is_wholly_wrong() -> None:
    found = one(np.ones((2, 4)), np.ones((2, 3)))
    assert (found.shape_mismatches, found.relative, found.percentiles["50"]) == (2, 1.0, 1.0)
    assert relative_error({"y": np.ones(3)}, {"y": np.ones(2)}) == 1.0


def test_non_finite_values_are_counted_and_kept_out_of_the_sums() -> None:
    reference = np.array([[1.0, np.nan, 3.0], [1.0, 2.0, 3.0]])
    candidate = np.array([[1.0, np.nan, 3.0], [np.inf, 2.0, 3.0]])
    found = one(reference, candidate)
    assert (found.non_finite_reference, found.non_finite_new, found.relative) == (1, 1, 0.0)


def test_real_numbers_alone_make_the_overall_error() -> None:
    first = {"y": np.ones(4), "index": np.array([1000])}
    second = {"y": np.ones(4) * 1.1, "index": np.array([2000])}
    assert relative_error(first, second) == pytest.approx(0.1)
    assert relative_error({"i": np.array([1])}, {"i": np.array([2])}) == 1.0
    assert relative_error({"s": [np.ones(2)]}, {"s": [np.zeros(2)]}) == 0.0
