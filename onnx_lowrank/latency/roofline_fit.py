"""A roofline fitted to measured latencies, and how well it foretells layers it has not seen.

Robust least squares on the logarithm of the latency: relative errors count alike for fast and slow chains, and a chain
that some kernel treats oddly does not bend the rest. Only peak times efficiency can be told from latencies: the peak
reported is the rate of the most efficient class of operators.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import least_squares

from onnx_lowrank.errors import InputError
from onnx_lowrank.latency.grid import KINDS, Kind
from onnx_lowrank.latency.roofline import OP_CLASSES, Features, Roofline, Times
from onnx_lowrank.latency.work import BYTES, FLOAT32, Work

FOLDS = 5
FEWEST_LAYERS = 5
_SCALE = 0.1  # residuals (of logarithms) beyond it count linearly instead of squared
_TYPICAL = Roofline(
    device="",
    origin="",
    peak_flops={FLOAT32: 1e11},
    bandwidth=1e10,
    launch_s=4e-6,
    efficiency=dict.fromkeys(OP_CLASSES, 1.0),
    overlap=dict.fromkeys(KINDS, 0.5),
    half_length=32.0,
)
_RANGE = 1e5  # of every quantity, up and down from the typical one


@dataclass(frozen=True)
class Timed:
    """A chain and its measured latency in milliseconds."""

    work: Work
    ms: float


@dataclass(frozen=True)
class Errors:
    """Relative errors |estimate / measured - 1| of held-out layers' chains.

    Args:
        median: Half of the estimates are closer.
        p90: Nine tenths are.
        ratio_median: The same for chain / layer, which the search chooses by; None where no chain was timed.
        ratio_p90: Likewise.
        chains: How many there were.
        layers: Of how many layers.
    """

    median: float
    p90: float
    ratio_median: float | None
    ratio_p90: float | None
    chains: int
    layers: int

    def __str__(self) -> str:
        return (
            f"{self.chains} latencies of {self.layers} layers; of layers held out, half within {self.median:.0%} and"
            f" nine tenths within {self.p90:.0%}"
        )


def fit(timed: Sequence[Timed], device: str, blocks: Mapping[Kind, int]) -> Roofline:
    """The roofline closest to what was measured.

    Classes of operators that were not measured are taken to be as slow as the slowest that was, other element types to
    run at the rate of float32.

    Args:
        timed: At least one per quantity to be told.
        device: In words.
        blocks: Channel blocks, for whoever chooses ranks.
    """
    found, logs = Features.of([each.work for each in timed]), np.log([each.ms for each in timed])
    layout = _Layout.of(found)

    def residuals(vector: Times) -> Times:
        return np.log(layout.roofline(vector).times(found)) - logs

    bounds = layout.bounds()
    start = np.clip(layout.start(), *bounds)
    vector = least_squares(residuals, start, bounds=bounds, loss="soft_l1", f_scale=_SCALE).x
    made = layout.roofline(vector)
    return replace(made, device=device, origin=f"fitted to {len(timed)} latencies", blocks=blocks)


def cross_validated(timed: Sequence[Timed]) -> Errors:
    """Errors of every chain, estimated by rooflines fitted to the other layers.

    Raises:
        InputError: for fewer than five layers.
    """
    layers = list(dict.fromkeys(each.work.layer for each in timed))
    if len(layers) < FEWEST_LAYERS:
        got = f"latencies of {len(layers)} layers that say what was timed"
        raise InputError(got, f"those of at least {FEWEST_LAYERS}", "measure a model first, or a larger one")
    order = np.random.default_rng(0).permutation(len(layers))
    fold = {layer: int(order[index]) % FOLDS for index, layer in enumerate(layers)}
    logs: dict[int, float] = {}
    for number in range(FOLDS):
        rest = [each for each in timed if fold[each.work.layer] != number]
        held = [index for index, each in enumerate(timed) if fold[each.work.layer] == number]
        estimates = fit(rest, "", {}).times(Features.of([timed[index].work for index in held]))
        logs |= {i: math.log(ms / timed[i].ms) for i, ms in zip(held, estimates, strict=True)}
    own = {each.work.layer: logs[i] for i, each in enumerate(timed) if len(each.work.steps) == 1}
    chains = [i for i, each in enumerate(timed) if len(each.work.steps) > 1 and each.work.layer in own]
    ratios = [logs[i] - own[timed[i].work.layer] for i in chains]
    spread = (*_spread(list(logs.values())), *(_spread(ratios) if ratios else (None, None)))
    return Errors(*spread, chains=len(timed), layers=len(layers))


def _spread(logs: Sequence[float]) -> tuple[float, float]:
    errors = np.abs(np.expm1(logs))
    return float(np.median(errors)), float(np.quantile(errors, 0.9))


@dataclass(frozen=True)
class _Layout:
    """Where each quantity stands in the vector that is fitted: logarithms, but for the overlaps, which come last.

    Args:
        classes: Indices of the classes that were measured.
        types: Likewise of element types; the first one's rate is folded into the classes'.
    """

    classes: tuple[int, ...]
    types: tuple[int, ...]

    @staticmethod
    def of(found: Features) -> _Layout:
        """For what there is to fit to."""
        return _Layout(tuple(map(int, np.unique(found.op_class))), tuple(map(int, np.unique(found.elem_type))))

    def start(self) -> Times:
        """A typical machine."""
        common = (_TYPICAL.bandwidth, _TYPICAL.launch_s, _TYPICAL.half_length)
        rates = [_TYPICAL.peak_flops[FLOAT32]] * len(self.classes) + [1.0] * (len(self.types) - 1)
        return np.array([*np.log([*rates, *common]), *_TYPICAL.overlap.values()])

    def bounds(self) -> tuple[Times, Times]:
        """Far around it."""
        middle, reach = self.start(), math.log(_RANGE)
        low, high = middle - reach, middle + reach
        low[-len(KINDS) :], high[-len(KINDS) :] = 0.0, 1.0
        return low, high

    def roofline(self, vector: Times) -> Roofline:
        """The machine that a vector stands for."""
        count = len(self.classes)
        rates = dict(zip(self.classes, np.exp(vector[:count]), strict=True))
        peak, least = max(rates.values()), min(rates.values())
        efficiency = {name: float(rates.get(i, least) / peak) for i, name in enumerate(OP_CLASSES)}
        factors = np.exp([0.0, *vector[count : count + len(self.types) - 1]])
        names = list(BYTES)
        peaks = {names[kind]: float(peak * factor) for kind, factor in zip(self.types, factors, strict=True)}
        common, overlap = vector[: -len(KINDS)], vector[-len(KINDS) :]
        bandwidth, launch_s, half_length = np.exp(common[-3:])
        return replace(
            _TYPICAL,
            peak_flops={FLOAT32: float(peak), **peaks},
            bandwidth=float(bandwidth),
            launch_s=float(launch_s),
            efficiency=efficiency,
            overlap=dict(zip(KINDS, map(float, overlap), strict=True)),
            half_length=float(half_length),
        )
