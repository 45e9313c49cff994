"""Goals, targets and --shape options: ranges, exact refusals, normalized weights; and the settings made of them."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_lowrank.errors import InputError
from onnx_lowrank.goals import (
    DEFAULT_GOAL,
    GOALS,
    Goal,
    KeepMacs,
    KeepParams,
    LatencyMs,
    MaxDrop,
    MaxError,
    Speedup,
    one_goal,
)
from onnx_lowrank.plan import PassSpec
from onnx_lowrank.recipe import Recipe
from onnx_lowrank.request import merged, settings_of
from onnx_lowrank.settings import Settings
from onnx_lowrank.target import InputShapes, Target, parse_shapes


@pytest.mark.parametrize(
    ("goal", "value", "message"),
    [
        (Speedup, 1.0, "got --speedup 1; expected a number above 1; give another value"),
        (Speedup, math.inf, "got --speedup inf; expected a number above 1; give another value"),
        (LatencyMs, 0.0, "got --latency-ms 0; expected a number above 0; give another value"),
        (LatencyMs, -3.0, "got --latency-ms -3; expected a number above 0; give another value"),
        (MaxError, math.nan, "got --max-error nan; expected a number above 0; give another value"),
        (MaxDrop, 0.0, "got --max-drop 0; expected a number above 0; give another value"),
        (KeepMacs, 1.5, "got --keep-macs 1.5; expected a number above 0, at most 1; give another value"),
        (KeepParams, 0.0, "got --keep-params 0; expected a number above 0, at most 1; give another value"),
    ],
)
def test_a_goal_out_of_range(goal: type[Goal], value: float, message: str) -> None:
    with pytest.raises(InputError) as caught:
        goal(value)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("goal", "text"),
    [
        (Speedup(2), "speedup 2x"),
        (LatencyMs(3.5), "latency-ms 3.5 ms"),
        (MaxError(0.01), "max-error 0.01"),
        (MaxDrop(0.02), "max-drop 0.02"),
        (KeepMacs(1.0), "keep-macs 1"),
        (KeepParams(0.25), "keep-params 0.25"),
    ],
)
def test_goals_in_words(goal: Goal, text: str) -> None:
    assert str(goal) == text
    assert one_goal({goal.kind: goal.value}) == goal


def test_no_goal_is_the_default_and_two_are_too_many() -> None:
    assert one_goal(dict.fromkeys([goal.kind for goal in GOALS])) == DEFAULT_GOAL == MaxError(0.01)
    with pytest.raises(InputError) as caught:
        one_goal({"keep-macs": 0.5, "speedup": 2.0})
    assert str(caught.value) == "got the goals --speedup, --keep-macs; expected at most one goal; leave one of them"


def test_zero_threads_are_all_cores() -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert Target().threads == cores
    assert Target(threads=3).threads == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"provider": "npu"},
            "got --provider npu; expected one of cpu, cuda, tensorrt, openvino, directml, coreml, xnnpack; "
            "name one of these",
        ),
        ({"threads": -1}, "got --threads -1; expected 0 (all cores) or more; give another number"),
    ],
)
def test_targets_that_cannot_be(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Target(**arguments)  # pyright: ignore[reportArgumentType] - wrong on purpose
    assert str(caught.value) == message


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=4))
def test_weights_of_shapes_sum_to_one_in_the_given_proportion(weights: list[float]) -> None:
    target = Target(shapes=tuple(InputShapes({"x": (i + 1,)}, weight) for i, weight in enumerate(weights)))
    normalized = [entry.weight for entry in target.shapes]
    assert sum(normalized) == pytest.approx(1)
    for one, given_weight in zip(normalized, weights, strict=True):
        assert one / normalized[0] == pytest.approx(given_weight / weights[0])


def test_equal_targets_are_equal_keys() -> None:
    def target(value: str) -> Target:
        return Target("cpu", 1, shapes=(InputShapes({"x": (1, 2)}),), provider_options={"a": value})

    assert hash(target("1")) == hash(target("1"))
    assert len({target("1"), target("1"), target("2")}) == 2
    assert target("1").provider_name == "CPUExecutionProvider"


def test_shapes() -> None:
    assert parse_shapes([]) == ()
    assert parse_shapes(["x=1x3x224x224"]) == (InputShapes({"x": (1, 3, 224, 224)}),)
    assert parse_shapes(["a:0=2*0.5", "n=scalar"]) == (InputShapes({"a:0": (2,), "n": ()}, 1.0),)
    assert parse_shapes(["x=1x8*3", "x=1x64*1", "mask=1"]) == (
        InputShapes({"x": (1, 8), "mask": (1,)}, 3.0),
        InputShapes({"x": (1, 64), "mask": (1,)}, 1.0),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["x=1,3"],
            "got --shape x=1,3; expected NAME=1x3x224x224, optionally *weight; write it like that",
        ),
        (["1x3"], "got --shape 1x3; expected NAME=1x3x224x224, optionally *weight; write it like that"),
        (["x=1x0"], "got --shape x=1x0 with a dimension of 0; expected positive dimensions; give a real size"),
        (["x=1*0"], "got --shape x=1*0; expected a positive weight after *; write for example *0.5"),
        (["x=1*1e999"], "got --shape x=1*1e999; expected a positive weight after *; write for example *0.5"),
        (["x=1*1-e"], "got --shape x=1*1-e; expected a positive weight after *; write for example *0.5"),
        (
            ["x=1", "x=2", "y=1", "y=2", "y=3"],
            "got different numbers of shapes (x: 2, y: 3); expected one or the same number for each; add the missing",
        ),
    ],
)
def test_shapes_that_cannot_be(options: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_shapes(options)
    assert str(caught.value) == message


def test_settings_of_nothing_are_the_defaults() -> None:
    assert settings_of(Recipe()) == Settings()


def test_settings_take_every_option() -> None:
    asked = Recipe(
        max_error=0.5,
        calibration=Path("c.npz"),
        eval=Path("e.npz"),
        metric="mse",
        preprocess="crop=8",
        samples=16,
        refit=False,
        error_metric="kl",
        provider="cpu",
        threads=2,
        shape=("x=1x2",),
        passes=(PassSpec("svd"),),
        allocator="energy",
        of="factorable",
        only=("a*",),
        keep=("b",),
        seed=3,
        time_limit=5.0,
        memory_limit=10,
        allow_fallback=True,
        bisect=True,
    )
    made = settings_of(asked, ["arena=1", "mode=a=b"])
    options = {"arena": "1", "mode": "a=b"}
    target = Target("cpu", 2, shapes=parse_shapes(["x=1x2"]), provider_options=options, allow_fallback=True)
    passes = (PassSpec("svd"),)
    data = (Path("c.npz"), "crop=8", 16, False, Path("e.npz"), "mse", "kl")
    assert made == Settings(
        MaxError(0.5), target, *data, passes, "energy", "factorable", ("a*",), ("b",), 3, 5.0, 10, bisect=True
    )


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            Recipe(allocator="magic"),
            "got --allocator magic; expected one of knapsack, energy, minimax, alds, alds_authors, lagrangian, lrank, "
            "pca_energy, constant_ratio, vbmf, beam, evolution, tpe, reinforcement, full_rank; name one of these",
        ),
        (Recipe(of="some"), "got --of some; expected all or factorable; name one of these"),
        (Recipe(seed=-1), "got --seed -1; expected 0 or more; give another number"),
        (
            Recipe(time_limit=math.nan),
            "got --time-limit nan; expected a positive number of seconds; give another number",
        ),
        (Recipe(samples=0), "got --samples 0; expected at least 1; give another number"),
        (
            Recipe(error_metric="l1"),
            "got --error-metric l1; expected one of relative, cosine, kl, top1, worst; name one of these",
        ),
        (
            Recipe(preprocess="blur=2"),
            "got --preprocess with 'blur=2'; expected name=value of resize, crop, channels, scale, mean, std, layout; "
            "correct it",
        ),
        (
            Recipe(max_drop=0.01),
            "got --max-drop 0.01 without --eval; expected labelled samples to measure the drop on; give --eval",
        ),
        (
            Recipe(refit=False),
            "got --no-refit without --calibration; expected samples that layers would be fitted to; "
            "give --calibration, or leave --no-refit out",
        ),
        (
            Recipe(samples=8),
            "got --samples without --calibration; expected data to take them from; give --calibration, "
            "or leave --samples out",
        ),
        (
            Recipe(metric="top5"),
            "got --metric without --eval; expected labelled samples to measure it on; give --eval, "
            "or leave --metric out",
        ),
        (
            Recipe(speedup=2.0, error_metric="kl"),
            "got --error-metric kl with --speedup 2x; expected a max-error goal, which is all it changes; "
            "give --max-error, or leave it out",
        ),
        (Recipe(memory_limit=0), "got --memory-limit 0; expected a positive number of bytes; give another number"),
    ],
)
def test_settings_that_cannot_be(asked: Recipe, message: str) -> None:
    with pytest.raises(InputError) as caught:
        settings_of(asked)
    assert str(caught.value) == message


def test_a_provider_option_needs_a_value() -> None:
    with pytest.raises(InputError) as caught:
        settings_of(Recipe(), ["arena"])
    assert str(caught.value) == "got --provider-option arena; expected name=value; write it like that"


def test_what_is_given_wins_over_the_recipe_and_replaces_its_goal() -> None:
    recipe = Recipe(speedup=2.0, threads=1, keep=("a",))
    assert merged(Recipe(), recipe) == recipe
    assert merged(Recipe(threads=4, max_error=0.1), recipe) == Recipe(max_error=0.1, threads=4, keep=("a",))


@pytest.mark.parametrize(
    ("settings", "names", "reason"),
    [
        (Settings(), ("conv1",), None),
        (Settings(keep=("head*",)), ("conv1", "head/1"), "pinned by --keep head*"),
        (Settings(only=("conv?", "fc")), ("conv1",), None),
        (Settings(only=("conv?", "fc")), ("head",), "not named by --only conv? fc"),
        (Settings(only=("conv?",), keep=("conv1",)), ("conv1",), "pinned by --keep conv1"),
    ],
)
def test_pins(settings: Settings, names: tuple[str, ...], reason: str | None) -> None:
    assert settings.pinned(*names) == reason
