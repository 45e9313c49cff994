"""Options that several commands share, each written once, and how they become a `Recipe`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from onnx_lowrank.allocators import ALLOCATORS
from onnx_lowrank.error_metrics import ERROR_METRICS
from onnx_lowrank.metrics import METRICS
from onnx_lowrank.recipe import Recipe, parse_passes, read_recipe
from onnx_lowrank.request import merged
from onnx_lowrank.target import ALL_LEVELS, PROVIDERS

GOALS = "Goals (at most one; none means --max-error 0.01)"
DATA = "Data"
TARGET = "Target"
SEARCH = "Search"

ModelArgument = Annotated[Path, typer.Argument(metavar="MODEL", help="The ONNX model; it is never changed.")]
OutOption = Annotated[Path, typer.Option("--output", "-o", help="Receives the result, whole or not at all.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]

SpeedupOption = Annotated[float | None, typer.Option(help="Times as fast as the original.", rich_help_panel=GOALS)]
LatencyOption = Annotated[float | None, typer.Option(help="Milliseconds per run.", rich_help_panel=GOALS)]
MaxErrorOption = Annotated[
    float | None, typer.Option(help="Largest error of the outputs, see --error-metric.", rich_help_panel=GOALS)
]
MaxDropOption = Annotated[
    float | None, typer.Option(help="Largest drop of --metric on --eval: 0.01 is a point.", rich_help_panel=GOALS)
]
KeepMacsOption = Annotated[
    float | None, typer.Option(help="Share of the multiply-accumulates to keep.", rich_help_panel=GOALS)
]
KeepParamsOption = Annotated[float | None, typer.Option(help="Share of the parameters to keep.", rich_help_panel=GOALS)]
CalibrationOption = Annotated[
    str | None,
    typer.Option(
        help="Unlabelled samples: .npz file, folder of .npy/.npz files or images, or module:function.",
        rich_help_panel=DATA,
    ),
]
PreprocessOption = Annotated[
    str | None, typer.Option(help="Images to arrays: resize=256,crop=224,scale=255,...", rich_help_panel=DATA)
]
SamplesOption = Annotated[
    int | None, typer.Option(help="Most samples of --calibration to use; 2048 by default.", rich_help_panel=DATA)
]
NoRefitOption = Annotated[
    bool,
    typer.Option(
        "--no-refit",
        help="No fit to the original's outputs; weights are still approximated on the samples.",
        rich_help_panel=DATA,
    ),
]
EvalOption = Annotated[
    str | None, typer.Option("--eval", help="Labelled samples, given like --calibration.", rich_help_panel=DATA)
]
MetricOption = Annotated[
    str | None, typer.Option(help=f"{', '.join(METRICS)}, or module:function.", rich_help_panel=DATA)
]
ErrorMetricOption = Annotated[
    str | None, typer.Option(help=f"Of --max-error: {', '.join(ERROR_METRICS)}.", rich_help_panel=DATA)
]
ProviderOption = Annotated[
    str | None, typer.Option(help=f"Execution provider: {', '.join(PROVIDERS)}.", rich_help_panel=TARGET)
]
ProviderOptionOption = Annotated[
    list[str] | None, typer.Option(help="name=value, passed to the provider.", rich_help_panel=TARGET)
]
ThreadsOption = Annotated[int | None, typer.Option(help="Threads; 0 means all cores.", rich_help_panel=TARGET)]
ThreadsListOption = Annotated[
    str | None, typer.Option("--threads", help="Threads, such as 1,2; 0 means all cores.", rich_help_panel=TARGET)
]
BatchesOption = Annotated[
    str | None,
    typer.Option("--batch", help="Sizes of the leading dimension, such as 1,8,32.", rich_help_panel=TARGET),
]
LevelsOption = Annotated[
    str | None,
    typer.Option(help=f"Levels of {', '.join(ALL_LEVELS)}; the best if not given.", rich_help_panel=TARGET),
]
ShapeOption = Annotated[
    list[str] | None, typer.Option(help="NAME=1x3x224x224, optionally *weight; repeatable.", rich_help_panel=TARGET)
]
DeviceOption = Annotated[
    str | None, typer.Option(help="Any part of a device's description in the table.", rich_help_panel=TARGET)
]
TableOption = Annotated[
    Path | None,
    typer.Option(help="Plan by the latencies in this file alone; nothing is timed here.", rich_help_panel=TARGET),
]
EstimateOption = Annotated[
    str | None,
    typer.Option(
        help="Plan by estimates, without any measurement: a name (see `latency estimates`) or a file of `latency fit`.",
        rich_help_panel=TARGET,
    ),
]
FallbackOption = Annotated[
    bool, typer.Option(help="Let nodes run on the CPU that the provider cannot take.", rich_help_panel=TARGET)
]
PassesOption = Annotated[
    str | None, typer.Option(help="Passes and decompositions to use: a,b{option=1}.", rich_help_panel=SEARCH)
]
AllocatorOption = Annotated[
    str | None, typer.Option(help=f"Rank rule: {', '.join(ALLOCATORS)}.", rich_help_panel=SEARCH)
]
EvaluationsOption = Annotated[
    int | None, typer.Option(help="Choices that a rule that searches measures; 100 by default.", rich_help_panel=SEARCH)
]
RecipeOption = Annotated[
    Path | None, typer.Option(help="TOML file with options of `optimize`; see the README.", rich_help_panel=SEARCH)
]
OfOption = Annotated[
    str | None, typer.Option(help="--keep-* counts `all` nodes or `factorable` layers.", rich_help_panel=SEARCH)
]
OnlyOption = Annotated[
    list[str] | None, typer.Option(help="Pattern of layers that may be rewritten.", rich_help_panel=SEARCH)
]
KeepOption = Annotated[list[str] | None, typer.Option(help="Pattern of layers that stay.", rich_help_panel=SEARCH)]
SeedOption = Annotated[
    int | None,
    typer.Option(
        help="Seed of drawn inputs, random searches and intervals; samples are always divided alike.",
        rich_help_panel=SEARCH,
    ),
]
TimeOption = Annotated[
    float | None, typer.Option(help="Seconds after which no further model is tried.", rich_help_panel=SEARCH)
]
MemoryOption = Annotated[
    int | None,
    typer.Option(help="Bytes for decomposed weights, and for the moments of one layer.", rich_help_panel=SEARCH),
]
BisectOption = Annotated[
    bool, typer.Option(help="Name the first rewrite beyond the error limit.", rich_help_panel=SEARCH)
]


def given(arguments: Mapping[str, object], recipe: Path | None) -> Recipe:
    """What a command was given, completed from its recipe file.

    Args:
        arguments: The command's parameters by name; flags that are off count as not given.
        recipe: The recipe file, or None.

    Raises:
        InputError: for a bad recipe or --passes.
    """
    names = {"labelled": "eval"}
    known = {item.name for item in fields(Recipe)}
    values: dict[str, object] = {}
    for parameter, value in arguments.items():
        name = names.get(parameter, parameter)
        if name not in known or value is None or value is False or value == []:
            continue
        if name == "passes":
            values[name] = tuple(parse_passes(str(value)))
        else:
            values[name] = tuple(value) if isinstance(value, list) else value  # pyright: ignore[reportUnknownArgumentType]
    if arguments.get("no_refit"):
        values["refit"] = False
    asked = Recipe(**values)  # pyright: ignore[reportArgumentType] - the parser checked the types
    return asked if recipe is None else merged(asked, read_recipe(recipe))
