"""How many samples calibration needs: nested and disjoint draws of growing size, beside the data-free result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.accuracy.experiment import Case
from benchmarks.accuracy.sweeps import fashion, zoo
from benchmarks.zoo.cache import default_cache, save_arrays
from benchmarks.zoo.model import ZooModel

COLUMNS = ("samples", "draw", "macs_kept", "speedup", "evaluation_error", "evaluation_error_ci95")


@dataclass(frozen=True)
class Setting:
    """One network at one budget.

    Attributes:
        model: What is optimized.
        goal: Option and value.
        options: Further options of `optimize`.
        shapes: Shapes to time with; those of the zoo by default.
        metric: Column of the task metric.
        samples: Sizes that its data reach.
    """

    model: ZooModel
    goal: tuple[str, str]
    options: tuple[str, ...]
    shapes: tuple[str, ...]
    metric: str
    samples: tuple[int, ...] = (32, 128, 512, 2048)


def settings() -> dict[str, Setting]:
    """By name on the command line."""
    embedded, minilm, hed = fashion(["embedded"]), zoo("minilm"), zoo("hed")
    return {
        "embedded": Setting(embedded.models[0], ("--keep-macs", "0.3"), embedded.options, (), "top1"),
        "minilm": Setting(minilm.models[0], ("--keep-macs", "0.6"), minilm.options, minilm.shapes, "probe_accuracy"),
        "hed": Setting(hed.models[0], ("--speedup", "3.9"), (), (), "edge_f1_exact", (32, 128)),
    }


def cases(setting: Setting, samples: Sequence[int], draws: int, threads: int, folder: Path) -> Iterator[Case]:
    """Data-free first, then every size and draw; the data are written to `folder` when their turn comes.

    Draw 0 of a size holds draw 0 of the smaller ones. The draws of one size share no sample.
    """
    options = ("--threads", str(threads), *setting.options)

    def case(method: str, calibration: Path | None, size: int, draw: int) -> Case:
        return Case(
            setting.model,
            method,
            setting.goal,
            options,
            setting.shapes,
            calibration=calibration,
            keys={"samples": size, "draw": draw},
        )

    yield case("data_free", None, 0, 0)
    for size in samples:
        for draw in range(draws):
            path = folder / f"{setting.model.name}_{size}_{draw}.npz"
            _write(setting.model, path, size, draw)
            yield case("calibrated", path, size, draw)


def _write(model: ZooModel, path: Path, size: int, draw: int) -> None:
    cache = default_cache()
    original = model.build(cache)
    data = model.calibration([source.fetch(cache) for source in model.sources], original, size * (draw + 1))
    save_arrays(path, {name: array[-size:] for name, array in data.items()})
