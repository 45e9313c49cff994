"""Sessions on a machine without onnx-lowrank, opened as `runtime` opens them: part of measure.py, see `on_target`."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import os
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

from onnx_lowrank.latency.machine import fingerprint
from onnx_lowrank.latency.turns import Now, clock_for

_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
}
LEVELS = {
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
}
_NO_GRAPH = -1  # this run is neither captured nor replayed, whatever the provider's options
_GRAPHS = itertools.count(1)


class RefusedError(Exception):
    """A model that does not run on the provider asked for; says why."""


class RequestError(Exception):
    """Nothing can be measured as asked: what was got, what was expected, what to do."""

    def __init__(self, got: str, expected: str, do: str) -> None:
        super().__init__(f"got {got}; expected {expected}; {do}")


class Bound:
    """A session with its inputs, and its outputs where their shapes are fixed, in the device's memory."""

    def __init__(self, session: Any, feeds: Mapping[str, Any], target: Target) -> None:
        self._session, self._device, self._binding = session, target.device, session.io_binding()
        self._options = _run_options(_NO_GRAPH)
        self._inputs = []  # held: the binding does not own the memory of arrays on the CPU
        for name, array in feeds.items():
            text = array.dtype.kind in "OUS"  # which stays on the host: devices have no strings
            where = ("cpu", 0) if text else target.device
            value = ort.OrtValue.ortvalue_from_numpy(array.astype(object) if text else array, *where)
            self._inputs.append(value)
            self._binding.bind_ortvalue_input(name, value)
        outputs = [(value.name, value.shape, value.type) for value in session.get_outputs()]
        self._without_room = [name for name, _, _ in outputs]
        self.seconds()
        self._outputs = self._binding.get_outputs()
        for (name, shape, kind), value in zip(outputs, self._outputs):
            if value.has_value() and value.is_tensor() and kind != "tensor(string)" and _fits(shape, value.shape()):
                self._binding.bind_ortvalue_output(name, value)
                self._without_room.remove(name)
        if target.captures_graph:
            if self._without_room:  # a replay writes where the capture did
                listed = ", ".join(self._without_room)
                raise RefusedError(f"a CUDA graph of a model whose outputs {listed} have another shape than declared")
            self._options = _run_options(next(_GRAPHS))
            self.seconds()

    def seconds(self, now: Now = time.perf_counter) -> float:
        """Run once, until the outputs are complete."""
        for name in self._without_room:
            self._binding.bind_output(name, *self._device)
        start = now()
        self._session.run_with_iobinding(self._binding, self._options)
        self._binding.synchronize_outputs()
        return now() - start


class Weighted:
    """A model on several inputs, each counting as much as its weight says."""

    def __init__(self, runs: Sequence[tuple[Bound, float]]) -> None:
        self._runs = runs

    def seconds(self, now: Now = time.perf_counter) -> float:
        """The weighted sum."""
        return sum(weight * run.seconds(now) for run, weight in self._runs)


class Target:
    """The provider, its options and threads; opens models on exactly that.

    Args:
        asked: What the command line says.
        manifest: What the request says.

    Raises:
        RequestError: for what the script cannot time, or this onnxruntime cannot check.
    """

    def __init__(self, asked: argparse.Namespace, manifest: Mapping[str, Any]) -> None:
        self.provider, self.name = manifest["provider"], manifest["provider_name"]
        self.options = dict(manifest["options"])
        self.options.update(map(_option, asked.provider_option))
        threads = manifest["threads"] if asked.threads is None else asked.threads
        if threads < 0:
            raise RequestError(f"--threads {threads}", "0 (all cores) or more", "give another number")
        affinity = getattr(os, "sched_getaffinity", None)
        self.threads = threads or (len(affinity(0)) if affinity else os.cpu_count() or 1)
        self.clock = clock_for(self.provider, self.threads)
        self._config, self._fallback = manifest["config"], asked.allow_fallback
        self._strict = self.provider != "cpu" and not self._fallback
        if self._strict:
            check_telling(self.provider, tells=hasattr(ort.InferenceSession, "get_provider_graph_assignment_info"))
        if self.provider == "cuda" and hasattr(ort, "preload_dlls"):
            with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
                ort.preload_dlls()

    @property
    def device(self) -> tuple[str, int]:
        """Where inputs and outputs live: kind of memory, and number of the device."""
        number = self.options.get("device_id", "0")
        return ("cuda", int(number) if number.isdecimal() else 0) if self.provider == "cuda" else ("cpu", 0)

    @property
    def captures_graph(self) -> bool:
        """Whether runs are recorded once as a CUDA graph and replayed."""
        return self.provider == "cuda" and self.options.get("enable_cuda_graph", "0").lower() in {"1", "true"}

    def open(self, model: str | bytes, level: str, shapes: Iterable[Sequence[str]] = ()) -> Any:
        """A session.

        Args:
            model: Its path, or itself.
            level: Graph optimization level.
            shapes: Operator and name of nodes that only compute shapes, and may run on the CPU.

        Raises:
            RefusedError: if nodes would run elsewhere, or onnxruntime refuses the model.
            RequestError: if the provider does not load, or does not know an option.
        """
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        # Errors are raised as well as logged; only of a provider that does not load is the log the only trace.
        options.log_severity_level = 4 if self.provider == "cpu" else 3
        options.graph_optimization_level = LEVELS[level]
        for key, value in self._config.items():
            options.add_session_config_entry(key, value)
        others = [] if self.provider == "cpu" else [("CPUExecutionProvider", {})]
        try:
            asked = [(self.name, self.options), *others]
            session = ort.InferenceSession(model, options, providers=asked, enable_fallback=0)
        except Exception as error:
            raise RefusedError(one_line(error)) from error
        if session.get_providers()[0] != self.name:
            do = "install what it needs (onnxruntime's log says what is missing), or choose another provider"
            raise RequestError(f"provider {self.provider} that does not load here", f"a working {self.name}", do)
        check_known(self.provider, self.options, session.get_provider_options()[self.name])
        if self._strict:
            parts = session.get_provider_graph_assignment_info()
            left = [(n.op_type, n.name) for part in parts if part.ep_name != self.name for n in part.get_nodes()]
            check_left(left, {(op, name) for op, name in shapes}, self.provider)
        return session

    def bind(self, session: Any, feeds: Mapping[str, Any]) -> Bound:
        """Inputs and outputs on the device; runs once.

        Raises:
            RefusedError: if it does not run.
        """
        try:
            return Bound(session, feeds, self)
        except Exception as error:
            raise RefusedError(one_line(error)) from error

    def bind_chain(self, model: bytes, level: str, shapes: Iterable[Sequence[str]] = ()) -> Bound:
        """A model of one input of fixed shape, on random values."""
        session = self.open(model, level, shapes)
        rng, given = np.random.default_rng(0), session.get_inputs()[0]
        if given.type not in _DTYPES:
            raise RefusedError(f"inputs of type {given.type} cannot be made with numpy")
        return self.bind(session, {given.name: rng.standard_normal(given.shape).astype(_DTYPES[given.type])})

    def circumstances(self, level: str, lowered_by: str) -> dict[str, Any]:
        """As latency tables spell them out."""
        mixed = {"allow_fallback": "true"} if self._fallback and self.provider != "cpu" else {}
        return {
            "device": fingerprint(self.provider, self.options),
            "provider": self.provider,
            "options": {**self.options, **mixed},
            "threads": self.threads,
            "onnxruntime": ort.__version__,
            "level": level,
            "clock": self.clock.value,
            "lowered_by": lowered_by,
        }


def check_telling(provider: str, *, tells: bool) -> None:
    """Refuse a strict run that nobody can check; `tells`: this onnxruntime says which nodes run where."""
    if not tells:
        raise RequestError(
            f"onnxruntime {ort.__version__}, which does not say which nodes {provider} takes",
            "onnxruntime 1.24 or newer for a strict run",
            "install one, or go without the check with --allow-fallback",
        )


def check_known(provider: str, options: Collection[str], known: Collection[str]) -> None:
    """Refuse options that the opened provider does not list."""
    unknown = sorted(set(options) - set(known))
    if unknown:
        listed = ", ".join(sorted(known)) or "none: it has no options"
        raise RequestError(f"unknown option {', '.join(unknown)} of provider {provider}", listed, "correct it")


def check_left(left: Iterable[tuple[str, str]], shapes: Collection[tuple[str, str]], provider: str) -> None:
    """Refuse a model of which the provider leaves nodes to another one, computations of shapes excepted."""
    missed = [f"{op} {name}".strip() for op, name in dict.fromkeys(left) if (op, name) not in shapes]
    if missed:
        more = f" and {len(missed) - 3} more" if len(missed) > 3 else ""
        listed = ", ".join(missed[:3])
        raise RefusedError(
            f"{len(missed)} nodes that {provider} leaves to another provider ({listed}{more}); --allow-fallback lets it"
        )


def one_line(error: Exception) -> str:
    """What an error says, short enough for a table."""
    return " ".join(str(error).split())[:300]


def _option(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise RequestError(f"--provider-option {text}", "name=value", "write it like that")
    return name, value


def _fits(declared: Sequence[Any], shape: Sequence[int]) -> bool:
    """Whether a shape agrees with the sizes that are declared as fixed."""
    return len(shape) == len(declared) and all(
        not isinstance(dim, int) or dim == size for dim, size in zip(declared, shape)
    )


def _run_options(graph: int) -> Any:
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph))
    return options
