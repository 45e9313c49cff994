"""Where the model will run: execution provider and its options, threads, optimization level, input shapes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from onnx_lowrank.errors import InputError

Shape = tuple[int, ...]
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "directml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
}
ALL_LEVELS = ("none", "basic", "extended", "all")
LEVELS = ("all", "extended")  # worth trying
# onnxruntime's CUDA provider picks cuDNN's convolution algorithms by rule or by trial; either may win by far (#22705).
CONV_SEARCHES = ("HEURISTIC", "EXHAUSTIVE")


@dataclass(frozen=True)
class InputShapes:
    """One set of input shapes and how much it counts in the latency; weights are normalized to sum 1 by `Target`."""

    shapes: dict[str, Shape]
    weight: float = 1.0

    def __hash__(self) -> int:
        return hash((tuple(sorted(self.shapes.items())), self.weight))


@dataclass(frozen=True)
class Target:
    """The machine, as far as latency depends on it.

    Args:
        provider: Short name, a key of `PROVIDERS`.
        threads: Intra-op threads; 0 means one per core this process may use.
        levels: Graph optimization levels to try; the best one counts.
        shapes: Sets of input shapes with weights; empty means: dynamic dimensions are filled with defaults and said so.
        provider_options: Passed to onnxruntime as they are.
        allow_fallback: Nodes may run on the CPU provider where the provider asked for cannot take them.

    Raises:
        InputError: for an unknown provider or a negative thread count.
    """

    provider: str = "cpu"
    threads: int = 0
    levels: tuple[str, ...] = LEVELS
    shapes: tuple[InputShapes, ...] = ()
    provider_options: dict[str, str] = field(default_factory=dict[str, str])
    allow_fallback: bool = False

    def __post_init__(self) -> None:
        """Resolve the thread count and normalize the weights."""
        if self.provider not in PROVIDERS:
            known = ", ".join(PROVIDERS)
            raise InputError(f"--provider {self.provider}", f"one of {known}", "name one of these")
        if self.threads < 0:
            raise InputError(f"--threads {self.threads}", "0 (all cores) or more", "give another number")
        if self.threads == 0:
            object.__setattr__(
                self,
                "threads",
                len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            )
        total = sum(entry.weight for entry in self.shapes)
        if self.shapes:
            normalized = tuple(InputShapes(entry.shapes, entry.weight / total) for entry in self.shapes)
            object.__setattr__(self, "shapes", normalized)

    def __hash__(self) -> int:
        return hash(
            (self.provider, self.threads, self.levels, self.shapes, tuple(sorted(self.provider_options.items())))
        )

    @property
    def provider_name(self) -> str:
        """Onnxruntime's name of the provider."""
        return PROVIDERS[self.provider]

    @property
    def device(self) -> tuple[str, int]:
        """Where inputs and outputs live while a model is timed: kind of memory, and number of the device."""
        if self.provider not in {"cuda", "tensorrt"}:
            return "cpu", 0
        number = self.provider_options.get("device_id", "0")
        return "cuda", int(number) if number.isdecimal() else 0

    def exact(self) -> Target:
        """The same with plain float32 arithmetic, for comparing numbers: TensorFloat-32 alone differs by 1e-3."""
        if self.provider != "cuda":
            return self
        return replace(self, provider_options={**self.provider_options, "use_tf32": "0"})

    def variants(self) -> tuple[Target, ...]:
        """The provider options worth timing where the user leaves them open; at least the target itself."""
        if self.provider != "cuda":
            return (self,)
        given = {"use_tf32": "1", **self.provider_options}
        searches = (given["cudnn_conv_algo_search"],) if "cudnn_conv_algo_search" in given else CONV_SEARCHES
        return tuple(replace(self, provider_options={**given, "cudnn_conv_algo_search": each}) for each in searches)


_SHAPE = re.compile(r"^(?P<name>.+?)=(?P<dims>[0-9]+(x[0-9]+)*|scalar)(\*(?P<weight>[0-9.eE+-]+))?$")


def parse_shapes(options: Iterable[str]) -> tuple[InputShapes, ...]:
    """Read `--shape NAME=1x3x224x224*weight` options.

    An input named once has that shape in every set; inputs named k times make k sets, taken in order.

    Raises:
        InputError: for a malformed option, a zero dimension, or inputs with different numbers of shapes.
    """
    per_input: dict[str, list[tuple[Shape, float]]] = {}
    for option in options:
        match = _SHAPE.match(option)
        if match is None:
            raise InputError(f"--shape {option}", "NAME=1x3x224x224, optionally *weight", "write it like that")
        dims = match["dims"]
        shape = () if dims == "scalar" else tuple(int(dim) for dim in dims.split("x"))
        if 0 in shape:
            raise InputError(f"--shape {option} with a dimension of 0", "positive dimensions", "give a real size")
        per_input.setdefault(match["name"], []).append((shape, _weight(option, match["weight"])))
    counts = {len(entries) for entries in per_input.values()} - {1}
    if len(counts) > 1:
        listed = ", ".join(f"{name}: {len(entries)}" for name, entries in per_input.items())
        raise InputError(
            f"different numbers of shapes ({listed})", "one or the same number for each", "add the missing"
        )
    sets: list[InputShapes] = []
    for i in range(max(counts, default=1 if per_input else 0)):
        picked = {name: entries[i if len(entries) > 1 else 0] for name, entries in per_input.items()}
        weights = [entry[1] for name, entry in picked.items() if len(per_input[name]) > 1] or [1.0]
        sets.append(InputShapes({name: entry[0] for name, entry in picked.items()}, max(weights)))
    return tuple(sets)


def _weight(option: str, text: str | None) -> float:
    try:
        weight = 1.0 if text is None else float(text)
    except ValueError:
        weight = -1.0
    if not 0 < weight < float("inf"):
        raise InputError(f"--shape {option}", "a positive weight after *", "write for example *0.5")
    return weight
