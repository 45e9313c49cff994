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
# What is above "basic" rewrites the CPU and CUDA providers' own nodes only, and OpenVINO has taken all of them by then.
PROVIDER_LEVELS = {"openvino": ("basic", "none")}
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
        levels: Graph optimization levels to try, the best one counts; empty means those that differ on the provider.
        shapes: Sets of input shapes with weights; empty means: dynamic dimensions are filled with defaults and said so.
        provider_options: Passed to onnxruntime as they are; see `options` for what is added.
        allow_fallback: Nodes may run on the CPU provider where the provider asked for cannot take them.

    Raises:
        InputError: for an unknown provider or a negative thread count.
    """

    provider: str = "cpu"
    threads: int = 0
    levels: tuple[str, ...] = ()
    shapes: tuple[InputShapes, ...] = ()
    provider_options: dict[str, str] = field(default_factory=dict[str, str])
    allow_fallback: bool = False

    def __post_init__(self) -> None:
        """Resolve thread count and levels, and normalize the weights."""
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
        if not self.levels:
            object.__setattr__(self, "levels", PROVIDER_LEVELS.get(self.provider, LEVELS))
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
    def options(self) -> dict[str, str]:
        """The provider options a session is opened with: those given, and what the provider needs to obey `threads`."""
        match self.provider:
            case "openvino":
                # Said, so that the report does not depend on what the build takes by default.
                device = {"device_type": "CPU", **self.provider_options}
                own_pool = device["device_type"] == "CPU" and "load_config" not in device
                return {"num_of_threads": str(self.threads), **device} if own_pool else device
            case "xnnpack":
                return {"intra_op_num_threads": str(self.threads), **self.provider_options}
            case _:
                return dict(self.provider_options)

    @property
    def providers(self) -> list[tuple[str, dict[str, str]]]:
        """Names and options of the providers to ask for, in order; strictness is checked on the opened session."""
        asked = [(self.provider_name, self.options)]
        if self.provider == "tensorrt" and self.allow_fallback:
            device = {name: value for name, value in self.provider_options.items() if name == "device_id"}
            asked.append((PROVIDERS["cuda"], device))
        return asked if self.provider == "cpu" else [*asked, (PROVIDERS["cpu"], {})]

    @property
    def host_threads(self) -> int:
        """Threads of onnxruntime's own pool: one where the provider brings a pool, which that one would disturb."""
        return 1 if self.provider in {"openvino", "xnnpack"} else self.threads

    @property
    def in_calling_thread(self) -> bool:
        """Whether all the work of a run is done by the thread that asks for it."""
        if self.provider == "openvino":
            return self.options.get("num_of_threads") == "1" and self.options["device_type"] == "CPU"
        return self.provider == "cpu" and self.threads == 1

    @property
    def captures_graph(self) -> bool:
        """Whether runs are recorded once as a CUDA graph and replayed: on the same memory, for the same shapes."""
        option = {"cuda": "enable_cuda_graph", "tensorrt": "trt_cuda_graph_enable"}.get(self.provider, "")
        return self.provider_options.get(option, "0").lower() in {"1", "true"}

    @property
    def compiles(self) -> bool:
        """Whether the provider turns whole subgraphs into one node, so that a profile does not name what is in it."""
        return self.provider not in {"cpu", "cuda"}

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

    def for_samples(self) -> Target:
        """Where parts of a model are walked through with samples, on all cores: the CPU, or CUDA in plain float32.

        Other providers compile what they are given; a part of one node they leave alone, and numbers are what counts.
        """
        if self.provider != "cuda":
            return Target()
        return replace(self, threads=0, allow_fallback=True).exact()

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
