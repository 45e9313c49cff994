"""From what the user wrote, on the command line and in a recipe, to `Settings`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace

from onnx_lowrank.allocators import ALLOCATORS, BY_OPTUNA, SEARCHING, require_optuna
from onnx_lowrank.data.preprocessing import parse_preprocess
from onnx_lowrank.error_metrics import check_error_metric
from onnx_lowrank.errors import InputError
from onnx_lowrank.goals import GOALS, MaxDrop, MaxError, one_goal
from onnx_lowrank.metrics import metric_named
from onnx_lowrank.recipe import Recipe
from onnx_lowrank.settings import Settings
from onnx_lowrank.target import Target, parse_shapes


def merged(given: Recipe, recipe: Recipe) -> Recipe:
    """The options given, and those of the recipe where none is given. A goal given replaces the recipe's goal."""
    goals = {goal.kind.replace("-", "_") for goal in GOALS}
    if any(getattr(given, name) is not None for name in goals):
        recipe = replace(recipe, **dict.fromkeys(goals))
    chosen = {f.name: getattr(given, f.name) for f in fields(Recipe) if getattr(given, f.name) is not None}
    return replace(recipe, **chosen)


def settings_of(asked: Recipe, options: Iterable[str] = ()) -> Settings:
    """Settings with defaults where nothing was asked for; `options` are those of the provider.

    Raises:
        InputError: for contradictory goals, or a value outside its range.
    """
    goal = one_goal({goal.kind: getattr(asked, goal.kind.replace("-", "_")) for goal in GOALS})
    target = Target(
        provider=asked.provider or "cpu",
        threads=asked.threads or 0,
        shapes=parse_shapes(asked.shape or ()),
        provider_options=dict(provider_options(options)),
        allow_fallback=bool(asked.allow_fallback),
    )
    named = {item.name for item in fields(Settings)} & {item.name for item in fields(Recipe)}
    chosen = {name: getattr(asked, name) for name in named if getattr(asked, name) is not None}
    settings = Settings(goal=goal, target=target, **chosen)
    _check(settings)
    _check_used(asked, settings)
    return settings


def provider_options(options: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Read --provider-option name=value.

    Raises:
        InputError: for one without a name or a value.
    """
    return tuple(_option(text) for text in options)


def _option(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise InputError(f"--provider-option {text}", "name=value", "write it like that")
    return name, value


def _check(settings: Settings) -> None:
    if settings.allocator not in ALLOCATORS:
        known = ", ".join(ALLOCATORS)
        raise InputError(f"--allocator {settings.allocator}", f"one of {known}", "name one of these")
    if settings.allocator in SEARCHING and isinstance(settings.goal, MaxError | MaxDrop):
        got, do = (
            f"--allocator {settings.allocator} with --{settings.goal}",
            "give --speedup, --latency-ms, --keep-macs or --keep-params",
        )
        raise InputError(got, "a goal of speed or size: every allocation is a search of its own", do)
    if settings.allocator in BY_OPTUNA:
        require_optuna(settings.allocator)
    if settings.of not in {"all", "factorable"}:
        raise InputError(f"--of {settings.of}", "all or factorable", "name one of these")
    if settings.seed < 0:
        raise InputError(f"--seed {settings.seed}", "0 or more", "give another number")
    if settings.time_limit is not None and not settings.time_limit > 0:
        raise InputError(f"--time-limit {settings.time_limit:g}", "a positive number of seconds", "give another number")
    if settings.memory_limit <= 0:
        raise InputError(f"--memory-limit {settings.memory_limit}", "a positive number of bytes", "give another number")
    if settings.evaluations < 1:
        raise InputError(f"--evaluations {settings.evaluations}", "at least 1", "give another number")
    if settings.samples < 1:
        raise InputError(f"--samples {settings.samples}", "at least 1", "give another number")
    if settings.preprocess is not None:
        parse_preprocess(settings.preprocess)
    check_error_metric(settings.error_metric)
    metric_named(settings.metric)


def _check_used(asked: Recipe, settings: Settings) -> None:
    """Refuse options that would be without effect: whoever gave them expects one."""
    no_data, searching = settings.calibration is None, settings.allocator in SEARCHING
    measuring = f"--allocator {settings.allocator}"
    rules = ", ".join(sorted(SEARCHING))
    for option, idle, missing, needed in (
        ("--no-refit", asked.refit is False and no_data, "--calibration", "samples that layers would be fitted to"),
        (measuring, searching and no_data, "--calibration", "samples to measure its choices on"),
        ("--evaluations", asked.evaluations is not None and not searching, "--allocator", f"a rule of {rules}"),
        ("--samples", asked.samples is not None and no_data, "--calibration", "data to take them from"),
        ("--metric", asked.metric is not None and settings.eval is None, "--eval", "labelled samples to measure it on"),
    ):
        if idle:
            raise InputError(f"{option} without {missing}", needed, f"give {missing}, or leave {option} out")
    if asked.error_metric is not None and not isinstance(settings.goal, MaxError):
        got = f"--error-metric {settings.error_metric} with --{settings.goal}"
        raise InputError(got, "a max-error goal, which is all it changes", "give --max-error, or leave it out")
