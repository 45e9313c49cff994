"""Rooflines of devices nobody measured, by data sheets and rules of thumb; `assets/estimates.toml` names sources."""

from __future__ import annotations

import functools
import tomllib
from importlib import resources
from pathlib import Path

from onnx_lowrank.errors import InputError
from onnx_lowrank.latency.roofline import Roofline, read_roofline, roofline_of

ORIGIN = "by data sheet and rules of thumb"


@functools.cache
def shipped() -> dict[str, Roofline]:
    """Name -> the roofline of every device there is an estimate of, sorted."""
    raw = tomllib.loads((resources.files("onnx_lowrank.assets") / "estimates.toml").read_text(encoding="utf-8"))
    rules = dict(raw["rules"])
    rules["launch_s"] = 1e-6 * rules.pop("launch_us")
    return {
        name: roofline_of(
            rules
            | {"device": entry["device"], "origin": ORIGIN, "bandwidth": 1e9 * entry["bandwidth"]}
            | {"peak_flops": {kind: 1e12 * rate for kind, rate in entry["peak_tflops"].items()}}
        )
        for name, entry in sorted(raw["devices"].items())
    }


def estimate_named(name: str) -> Roofline:
    """A shipped estimate, or the roofline in a file that `latency fit` wrote.

    Raises:
        InputError: if it is neither.
    """
    known = shipped()
    if name.lower() in known:
        return known[name.lower()]
    if not Path(name).is_file():
        expected = f"one of {', '.join(known)}, or a file"
        raise InputError(f"--estimate {name}", expected, "make one with `onnx-lowrank latency fit`")
    return read_roofline(Path(name))
