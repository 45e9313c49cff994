"""Sessions on a machine without onnx-lowrank, opened as `runtime` opens them: part of measure.py, see `on_target`."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping, Sequence
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


class RefusedError(Exception):
    """A model that does not run on the provider asked for; says why."""


class Bound:
    """A session with its inputs, and its outputs where their shapes are fixed, in the device's memory."""

    def __init__(self, session: Any, feeds: Mapping[str, Any], device: str) -> None:
        self._session, self._device, self._binding = session, device, session.io_binding()
        self._inputs = []  # held: the binding does not own the memory of arrays on the CPU
        for name, array in feeds.items():
            text = array.dtype.kind in "OUS"
            value = ort.OrtValue.ortvalue_from_numpy(array.astype(object) if text else array, "cpu" if text else device)
            self._inputs.append(value)
            self._binding.bind_ortvalue_input(name, value)
        outputs = [(value.name, value.shape, value.type) for value in session.get_outputs()]
        self._without_room = [name for name, _, _ in outputs]
        self.seconds()
        self._outputs = self._binding.get_outputs()
        for (name, shape, kind), value in zip(outputs, self._outputs):
            if value.has_value() and value.is_tensor() and kind != "tensor(string)" and list(value.shape()) == shape:
                self._binding.bind_ortvalue_output(name, value)
                self._without_room.remove(name)

    def seconds(self, now: Now = time.perf_counter) -> float:
        """Run once, until the outputs are complete."""
        for name in self._without_room:
            self._binding.bind_output(name, self._device)
        start = now()
        self._session.run_with_iobinding(self._binding)
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
    """

    def __init__(self, asked: argparse.Namespace, manifest: Mapping[str, Any]) -> None:
        self.provider = asked.provider or manifest["provider"]
        self.options = dict(manifest["options"] if self.provider == manifest["provider"] else {})
        self.options.update(option.split("=", 1) for option in asked.provider_option)
        threads = manifest["threads"] if asked.threads is None else asked.threads
        affinity = getattr(os, "sched_getaffinity", None)
        self.threads = threads or (len(affinity(0)) if affinity else os.cpu_count() or 1)
        self.name = manifest["providers"][self.provider]
        self.clock = clock_for(self.provider, self.threads)
        self.device = "cuda" if self.provider in {"cuda", "tensorrt"} else "cpu"
        self._config, self._fallback = manifest["config"], asked.allow_fallback

    def open(self, model: str | bytes, level: str) -> Any:
        """A session.

        Raises:
            RefusedError: if it does not load, or nodes would run elsewhere.
        """
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        options.log_severity_level = 4
        options.graph_optimization_level = LEVELS[level]
        for key, value in self._config.items():
            options.add_session_config_entry(key, value)
        others = [] if self.provider == "cpu" else [("CPUExecutionProvider", {})]
        try:
            session = ort.InferenceSession(model, options, providers=[(self.name, self.options), *others])
        except Exception as error:
            raise RefusedError(one_line(error)) from error
        if session.get_providers()[0] != self.name:
            raise RefusedError(f"{self.name} does not load here: onnxruntime would use {session.get_providers()[0]}")
        if not self._fallback and hasattr(session, "get_provider_graph_assignment_info"):
            parts = [part for part in session.get_provider_graph_assignment_info() if part.ep_name != self.name]
            if parts and self.provider != "cpu":
                raise RefusedError(f"nodes run on {parts[0].ep_name}; --allow-fallback lets them")
        return session

    def bind(self, session: Any, feeds: Mapping[str, Any]) -> Bound:
        """Inputs and outputs on the device; runs once.

        Raises:
            RefusedError: if it does not run.
        """
        try:
            return Bound(session, feeds, self.device)
        except Exception as error:
            raise RefusedError(one_line(error)) from error

    def bind_chain(self, model: bytes, level: str) -> Bound:
        """A model of one input of fixed shape, on random values."""
        session = self.open(model, level)
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
            "options": self.options | mixed,
            "threads": self.threads,
            "onnxruntime": ort.__version__,
            "level": level,
            "clock": self.clock.value,
            "lowered_by": lowered_by,
        }


def one_line(error: Exception) -> str:
    """What an error says, short enough for a table."""
    return " ".join(str(error).split())[:300]
