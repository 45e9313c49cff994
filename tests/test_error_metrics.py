"""What a limit on the error may mean: each metric against its definition on arrays."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from onnx_lowrank.error_metrics import ERROR_METRICS, error_in
from onnx_lowrank.errors import InputError
from onnx_lowrank.fidelity import FidelityMeter

Outputs = dict[str, np.ndarray]
RNG = np.random.default_rng(0)


def error(metric: str, reference: Outputs, candidate: Outputs) -> float:
    meter = FidelityMeter(scores_are_logits=metric == "kl")
    meter.update(reference, candidate, len(next(iter(reference.values()))))
    return error_in(metric, meter.result(), meter.relative_error)


def norm(array: np.ndarray) -> float:
    return float(np.linalg.norm(array))


def two(scale: float = 0.3) -> tuple[Outputs, Outputs]:
    a, b = RNG.standard_normal((9, 4)), RNG.standard_normal((9, 3, 5))
    return {"a": a, "b": b}, {"a": a + scale * RNG.standard_normal(a.shape), "b": b * (1 + scale)}


def test_relative_worst_and_cosine() -> None:
    before, after = two()
    parts = {name: norm(after[name] - before[name]) for name in before}
    whole = math.hypot(*parts.values()) / math.hypot(*(norm(array) for array in before.values()))
    assert error("relative", before, after) == pytest.approx(whole)
    assert error("worst", before, after) == pytest.approx(max(parts[n] / norm(before[n]) for n in parts))
    cosines = [np.sum(before[n] * after[n]) / norm(before[n]) / norm(after[n]) for n in before]
    assert error("cosine", before, after) == pytest.approx(1 - np.mean(cosines))


def test_top1_is_the_share_of_rows_that_change_class() -> None:
    before, after = two()
    changed = np.mean(before["a"].argmax(1) != after["a"].argmax(1))
    assert error("top1", before, after) == pytest.approx(changed)


@pytest.mark.parametrize("probabilities", [False, True])
def test_kl_is_that_of_the_softmax_or_of_the_probabilities_themselves(probabilities: bool) -> None:
    (before, after), made = two(), lambda array: special.softmax(array, axis=1)
    expected = stats.entropy(made(before["a"]), made(after["a"]), axis=1).mean()
    if probabilities:
        before, after = {"a": made(before["a"])}, {"a": made(after["a"])}
    assert error("kl", before, after) == pytest.approx(expected)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.sampled_from(ERROR_METRICS))
def test_nothing_is_zero_and_more_noise_is_worse(seed: int, metric: str) -> None:
    rng = np.random.default_rng(seed)
    before = {"y": rng.standard_normal((200, 5))}
    noise = rng.standard_normal((200, 5))
    errors = [error(metric, before, {"y": before["y"] + level * noise}) for level in (0.0, 0.1, 1.0, 3.0)]
    assert errors[0] == pytest.approx(0, abs=1e-12)
    assert errors == sorted(errors)


@pytest.mark.parametrize("metric", ["kl", "top1"])
def test_outputs_without_classes(metric: str) -> None:
    image = {"image": np.ones((2, 3, 4, 4))}
    with pytest.raises(InputError) as caught:
        error(metric, image, image)
    assert str(caught.value) == (
        f"got --error-metric {metric} for outputs without classes ('image'); expected an output of class "
        "probabilities, logits or scores; choose relative, cosine or worst"
    )


def test_outputs_of_another_shape_are_wholly_wrong() -> None:
    meter = FidelityMeter(scores_are_logits=True)
    for width in (3, 2):
        meter.update({"y": np.ones((1, 3))}, {"y": np.ones((1, width))}, 1)
    found = {metric: error_in(metric, meter.result(), meter.relative_error) for metric in ERROR_METRICS}
    half = math.sqrt(0.5)
    assert found == pytest.approx({"relative": half, "cosine": 1 - half, "kl": math.inf, "top1": 0.5, "worst": half})


def test_an_unknown_metric() -> None:
    with pytest.raises(InputError) as caught:
        error_in("l1", (), 0.0)
    assert str(caught.value) == (
        "got --error-metric l1; expected one of relative, cosine, kl, top1, worst; name one of these"
    )
