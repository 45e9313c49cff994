"""Rooflines: the equation, what a fit finds of a planted machine, files that are damaged."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_lowrank.errors import InputError
from onnx_lowrank.latency.estimates import estimate_named, shipped
from onnx_lowrank.latency.roofline import Roofline, read_roofline
from onnx_lowrank.latency.roofline_fit import Timed, cross_validated, fit
from onnx_lowrank.latency.work import Step, Work

MACHINE = Roofline(
    device="planted",
    origin="a test",
    peak_flops={"float32": 100e9, "float16": 180e9},
    bandwidth=8e9,
    launch_s=5e-6,
    efficiency={"conv": 0.8, "conv 1x1": 1.0, "conv one axis": 0.6, "conv grouped": 0.1, "matmul": 0.9},
    overlap={"conv": 0.0, "matmul": 1.0},
    half_length=40.0,
    blocks={"conv": 16, "matmul": 8},
)
SIZES = st.integers(1, 512)


def chains(rng: np.random.Generator, layers: int) -> list[Work]:
    """Layers and low-rank chains of all classes, small and large, in both types."""
    works: list[Work] = []
    for number in range(layers):
        kind, groups, kernel = [("float32", 1, (3, 3)), ("float16", 1, (1, 1)), ("float32", 1, (5, 1)),
                                ("float32", 8, (3, 3)), ("float32", 1, ()), ("float16", 1, ())][number % 6]  # fmt: skip
        out, in_, rows = (int(size) for size in 2 ** rng.uniform([3, 3, 0], [10, 10, 14]))
        name = f"layer {number}"
        works.append(Work(name, kind, (Step(groups, out, in_, kernel, rows, rows),)))
        for rank in (4, 16, 64):
            ones = (1,) * len(kernel)
            steps = (Step(groups, rank, in_, kernel, rows, rows), Step(groups, out, rank, ones, rows, rows))
            works.append(Work(name, kind, steps))
    return works


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_a_fit_finds_the_planted_machine(noise: float) -> None:
    rng = np.random.default_rng(0)
    works = chains(rng, 120)
    timed = [Timed(work, MACHINE.ms(work) * math.exp(noise * rng.standard_normal())) for work in works]
    for outlier in timed[::20]:  # what a kernel treats oddly does not bend the rest
        timed[timed.index(outlier)] = replace(outlier, ms=3 * outlier.ms)
    found = fit(timed, "planted", MACHINE.blocks)
    near = 0.03 + 5 * noise
    for name in ("bandwidth", "launch_s", "half_length"):
        assert getattr(found, name) == pytest.approx(getattr(MACHINE, name), rel=near), name
    for name, share in MACHINE.efficiency.items():
        assert found.rate(name) == pytest.approx(MACHINE.rate(name), rel=near), name
        assert found.efficiency[name] == pytest.approx(share, rel=2 * near), name
    assert found.peak_flops == pytest.approx(MACHINE.peak_flops, rel=2 * near)
    assert found.overlap == pytest.approx(MACHINE.overlap, abs=0.02 + 5 * noise)
    assert found.blocks == MACHINE.blocks
    errors = cross_validated(timed)
    assert (errors.chains, errors.layers) == (480, 120)
    assert errors.median < 0.01 + 1.5 * noise
    assert errors.ratio_median is not None
    assert 0.0 <= errors.ratio_median <= 0.01 + 2 * noise


def test_layers_alone_say_nothing_of_chains() -> None:
    works = [work for work in chains(np.random.default_rng(1), 60) if len(work.steps) == 1]
    errors = cross_validated([Timed(work, MACHINE.ms(work)) for work in works])
    assert (errors.ratio_median, errors.ratio_p90) == (None, None)


def test_fitted_to_one_kind_the_rest_is_no_faster() -> None:
    works = [work for work in chains(np.random.default_rng(1), 60) if not work.steps[0].kernel]
    found = fit([Timed(work, MACHINE.ms(work)) for work in works], "", {})
    assert all(found.rate(name) == pytest.approx(MACHINE.rate("matmul"), rel=0.05) for name in found.efficiency)


def test_too_few_layers_are_refused() -> None:
    timed = [Timed(work, 1.0) for work in chains(np.random.default_rng(0), 4)]
    with pytest.raises(InputError) as raised:
        cross_validated(timed)
    assert str(raised.value) == (
        "got latencies of 4 layers that say what was timed; expected those of at least 5;"
        " measure a model first, or a larger one"
    )


def test_by_hand() -> None:
    machine = replace(MACHINE, half_length=1e-30)
    product = Work("", "float32", (Step(1, 64, 32, (), 100, 100),))
    compute, transfer = 2 * 64 * 32 * 100 / 90e9, 4 * (64 * 32 + 100 * (64 + 32)) / 8e9
    assert machine.ms(product) == pytest.approx(1e3 * (5e-6 + max(compute, transfer)))
    conv = Work("", "float16", (Step(2, 8, 4, (3, 1), 50, 25),))
    compute, transfer = 2 * 2 * 8 * 4 * 3 * 25 / 18e9, 2 * 2 * (8 * 4 * 3 + 4 * 50 + 8 * 25) / 8e9
    assert machine.ms(conv) == pytest.approx(1e3 * (5e-6 + compute + transfer))
    both = Work("", "float32", (*product.steps, *product.steps))
    assert machine.ms(both) == pytest.approx(2 * machine.ms(product))
    assert machine.moved_ms(1000, "float16") == pytest.approx(1e3 * (5e-6 + 2000 / 8e9))


@settings(deadline=None, max_examples=40)
@given(SIZES, SIZES, SIZES, st.integers(1, 64), st.sampled_from([(), (1, 1), (3, 3)]))
def test_more_rank_takes_more_time(out: int, in_: int, rows: int, rank: int, kernel: tuple[int, ...]) -> None:
    ones = (1,) * len(kernel)
    for machine in (MACHINE, *shipped().values()):
        ms = [
            machine.ms(Work("", "float32", (Step(1, r, in_, kernel, rows, rows), Step(1, out, r, ones, rows, rows))))
            for r in (rank, rank + 1, 2 * rank + 1)
        ]
        assert ms == sorted(ms)
        assert ms[0] > 0


def test_a_file_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "roofline.json"
    path.write_text(MACHINE.to_json())
    assert read_roofline(path) == estimate_named(str(path)) == MACHINE


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"bandwidth": 0}, "ValueError: bandwidth 0"),
        ({"launch_s": "soon"}, "ValueError: launch_s 'soon'"),
        ({"peak_flops": {"float16": 1.0}}, "ValueError: peak_flops without float32"),
        ({"overlap": {"conv": 2, "matmul": 1}}, "ValueError: overlap {'conv': 2.0, 'matmul': 1.0}"),
        ({"efficiency": {"conv": 1.0}}, "KeyError: 'conv 1x1'"),
        ({"blocks": {"conv": -1, "matmul": 8}}, "ValueError: block of conv -1"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, change: Mapping[str, Any], wrong: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps(json.loads(MACHINE.to_json()) | change))
    with pytest.raises(InputError) as raised:
        read_roofline(path)
    remedy = "fit it again with `onnx-lowrank latency fit`"
    assert str(raised.value) == f"got {path} with a bad field ({wrong}); expected a roofline; {remedy}"


def test_every_shipped_estimate_says_what_it_is() -> None:
    assert {"t4", "a10", "a100", "h100", "l4", "rtx3090", "rtx4090", "orin"} <= set(shipped())
    for roofline in shipped().values():
        assert roofline.label.endswith("(estimated, not measured: by data sheet and rules of thumb)")
        assert roofline.rate("matmul", "float16") > roofline.rate("matmul")
    assert estimate_named("A100") is shipped()["a100"]
