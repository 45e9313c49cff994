"""The only door to onnxruntime: sessions that run where they were asked to run, or fail with a sentence that says why.

onnxruntime answers a request for a provider it cannot load with a session on the CPU and a Python warning
(microsoft/onnxruntime#17801). Here such a session is never handed out: its provider, its options and the placement of
every node are compared with the target first.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import platform
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import onnxruntime as ort
import onnxruntime.capi.onnxruntime_pybind11_state as ort_state
from numpy.typing import NDArray
from onnx import TensorProto

from onnx_lowrank.errors import InputError, ProviderError
from onnx_lowrank.kernel_trace import KernelEvent, read_events, shapes_by_node
from onnx_lowrank.layer import NodeShapes
from onnx_lowrank.native_log import captured_stderr, native_reason
from onnx_lowrank.placement import (
    Label,
    Placement,
    check_capturable,
    check_options,
    check_placement,
    placements,
    unloadable,
)
from onnx_lowrank.signature import Feeds, Signature, TensorSpec, parsed_spec
from onnx_lowrank.target import PROVIDERS, Target

_LEVELS = {
    "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
CONFIG = {
    "session.intra_op.allow_spinning": "0",  # spinning threads of one session disturb the other one in paired timing
    "session.inter_op.allow_spinning": "0",
    "session.dynamic_block_base": "4",  # lowers the variance between runs
    "session.record_ep_graph_assignment_info": "1",
}
_ERRORS: tuple[type[Exception], ...] = (  # onnxruntime's own exceptions share no base but Exception
    *(ort_state.EPFail, ort_state.Fail, ort_state.InvalidArgument, ort_state.InvalidGraph, ort_state.InvalidProtobuf),
    *(ort_state.NoSuchFile, ort_state.NotImplemented, ort_state.RuntimeException, RuntimeError, ValueError),
)
_NO_GRAPH = -1  # this run is neither captured nor replayed, whatever the provider's options
_GRAPHS = itertools.count(1)


class UnsupportedTypeError(ProviderError):
    """The provider has no kernel for an operator with these element types; a float32 twin of the model may run."""


class BoundRun:
    """A session with its inputs and outputs bound to memory on the device, ready to be timed again and again."""

    def __init__(self, session: ort.InferenceSession, feeds: Feeds, target: Target) -> None:
        self._session, self._binding, self._device = session, session.io_binding(), target.device
        self._options = _run_options(_NO_GRAPH)
        self._inputs = {
            # Text stays on the host: devices have no strings.
            name: ort.OrtValue.ortvalue_from_numpy(array, *(("cpu", 0) if array.dtype.kind in "OUS" else target.device))
            for name, array in feeds.items()
        }
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        declared = _specs(session.get_outputs())
        self._without_room = [spec.name for spec in declared]
        self.seconds()
        self._outputs = self._binding.get_outputs()
        for spec, value in zip(declared, self._outputs, strict=True):
            # Room of another shape than declared is refused, and exporters declare wrong shapes.
            plain = value.has_value() and value.is_tensor() and spec.elem_type != TensorProto.STRING
            if plain and spec.fits(value.shape()):
                self._binding.bind_ortvalue_output(spec.name, value)
                self._without_room.remove(spec.name)
        if target.captures_graph:
            check_capturable(self._without_room)
            self._options = _run_options(next(_GRAPHS))
            self.seconds()

    def seconds(self, now: Callable[[], float] = time.perf_counter) -> float:
        """Run once, until the outputs are complete; on the wall clock, or the one that `now` reads."""
        for name in self._without_room:
            self._binding.bind_output(name, *self._device)
        start = now()
        self._session.run_with_iobinding(self._binding, self._options)
        self._binding.synchronize_outputs()
        return now() - start


class Session:
    """An onnxruntime session whose provider and node placement were checked; made by `open_session`.

    Attributes:
        on_host: Shape computations that run on the CPU beside the provider asked for, as onnxruntime wants it.
    """

    def __init__(self, session: ort.InferenceSession, target: Target, label: str, on_host: Sequence[str]) -> None:
        self._session, self.target, self.label, self.on_host = session, target, label, on_host
        self.signature = Signature(_specs(session.get_inputs()), _specs(session.get_outputs()))

    def run(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        """Outputs by name.

        Raises:
            InputError: if the feeds do not fit the signature or the model fails on them.
        """
        with self._running():
            outputs = cast(list[NDArray[Any]], self._session.run(None, dict(feeds), _run_options(_NO_GRAPH)))
        return {value.name: output for value, output in zip(self.signature.outputs, outputs, strict=True)}

    def bind(self, feeds: Feeds) -> BoundRun:
        """Put `feeds` and room for the outputs into the device's memory; runs once.

        Raises:
            InputError: as for `run`.
        """
        with self._running():
            return BoundRun(self._session, feeds, self.target)

    def time(self, feeds: Feeds, repeats: int, now: Callable[[], float] = time.perf_counter) -> list[float]:
        """Seconds of each of `repeats` runs after one that is not counted; no copies from or to the host inside."""
        bound = self.bind(feeds)
        return [bound.seconds(now) for _ in range(repeats)]

    def placement(self) -> tuple[Placement, ...]:
        """Which provider took which operators, most nodes first; empty where onnxruntime cannot tell."""
        return placements(_assigned(self._session) or ())

    def profile_events(self) -> list[KernelEvent]:
        """Every kernel run so far, nested bodies included; ends profiling. For sessions opened with `profile_to`."""
        return read_events(Path(self._session.end_profiling()))

    @contextlib.contextmanager
    def _running(self) -> Generator[None]:
        try:
            yield
        except _ERRORS as error:
            wanted = ", ".join(map(str, self.signature.inputs)) or "no inputs"
            got = f"inputs that {self.label} cannot run on ({native_reason(error)})"
            raise InputError(got, wanted, "give inputs like these") from error


def open_session(
    model: Path | bytes,
    target: Target,
    level: str = "all",
    profile_to: Path | None = None,
    folder: Path | None = None,
) -> Session:
    """Open a model on exactly the provider of `target`.

    Args:
        model: A file (external data and models above 2 GB work), or a serialized model.
        target: Provider, its options, threads, and whether nodes may fall back to the CPU provider.
        level: Graph optimization level: none, basic, extended or all.
        profile_to: An existing folder that receives onnxruntime's profile; see `Session.profile_events`.
        folder: Where the external data of a serialized model lie.

    Raises:
        InputError: if onnxruntime cannot load the model.
        UnsupportedTypeError: if a kernel is missing, as for bfloat16 convolutions on the CPU.
        ProviderError: if the provider cannot load here, does not know an option, or leaves nodes to another provider.
    """
    config = {} if folder is None else {"session.model_external_initializers_file_folder_path": str(folder)}
    return _open(model, target, level, profile_to, config)


def trace(model: Path | bytes, feeds: Feeds, target: Target) -> dict[str, list[NodeShapes]]:
    """Shapes of everything every node read and wrote in one run without graph optimizations, bodies included.

    Args:
        model: As for `open_session`; nodes without a name, or sharing one, cannot be told apart: name them first.
        feeds: One sample.
        target: Where to run. Nodes may fall back, and a provider that compiles subgraphs, whose nodes no profile names,
            gives way to the CPU: shapes depend on neither.

    Returns:
        Node name -> its distinct sets of shapes with the number of runs that had them. Input shapes leave out optional
        inputs that are not given. Nodes that were never reached (a branch not taken) are missing.

    Raises:
        InputError, UnsupportedTypeError, ProviderError: as for `open_session` and `Session.run`.
    """
    target = Target(threads=target.threads) if target.compiles else replace(target, allow_fallback=True)
    with tempfile.TemporaryDirectory(prefix="onnx-lowrank-") as folder:
        # A prepacked weight is released and would be missing from the shapes.
        session = _open(model, target, "none", Path(folder), {"session.disable_prepacking": "1"})
        session.run(feeds)
        return shapes_by_node(session.profile_events())


def listed_providers() -> tuple[str, ...]:
    """Short names of the providers that the installed onnxruntime was built with."""
    listed = set(ort.get_available_providers())
    return tuple(short for short, name in PROVIDERS.items() if name in listed)


def versions() -> dict[str, str]:
    """Versions of everything a measured number depends on."""
    found = {"python": platform.python_version(), "onnxruntime": str(ort.__version__)}
    for package in ("onnx-lowrank", "onnx", "onnx-graphsurgeon", "numpy", "scipy", "tensorly"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _open(
    model: Path | bytes,
    target: Target,
    level: str,
    profile_to: Path | None,
    config: Mapping[str, str],
) -> Session:
    label = str(model) if isinstance(model, Path) else f"a model of {len(model)} bytes"
    options = _session_options(target, level, profile_to, config)
    name, foreign = target.provider_name, target.provider != "cpu"
    if name not in ort.get_available_providers():
        built = ", ".join(listed_providers())
        raise unloadable(target, f"this onnxruntime was built with {built} only")
    if target.provider in {"cuda", "tensorrt"} and hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find; the session says it better
            ort.preload_dlls()
    with captured_stderr() if foreign else contextlib.nullcontext(lambda: "") as complaints:
        try:
            source = str(model) if isinstance(model, Path) else model
            session = ort.InferenceSession(source, options, providers=target.providers, enable_fallback=0)
        except _ERRORS as error:
            raise _load_error(error, target, label) from error
        said = complaints()
    if session.get_providers()[0] != name:
        raise unloadable(target, said or "onnxruntime gives no reason")
    check_options(target, session.get_provider_options()[name])
    strict = foreign and not target.allow_fallback
    on_host = check_placement(_assigned(session), model, target, str(ort.__version__)) if strict else ()
    return Session(session, target, label, on_host)


def _session_options(target: Target, level: str, profile_to: Path | None, config: Mapping[str, str]) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = target.host_threads, 1
    options.enable_mem_pattern = target.provider != "directml"  # which refuses sessions that have it
    # Errors are raised as well as logged; only of a provider that does not load is the log the only trace.
    options.log_severity_level = 4 if target.provider == "cpu" else 3
    options.graph_optimization_level = _LEVELS[level]
    for key, value in {**CONFIG, **config}.items():
        options.add_session_config_entry(key, value)
    if profile_to is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile_to / "profile")
    return options


def _assigned(session: ort.InferenceSession) -> list[tuple[str, Label]] | None:
    """Provider, operator and name of every node; None if this onnxruntime does not tell (older than 1.24)."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return None
    parts = session.get_provider_graph_assignment_info()
    return [(str(part.ep_name), (str(n.op_type), str(n.name))) for part in parts for n in part.get_nodes()]


def _run_options(graph: int) -> Any:
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph))
    return options


def _load_error(error: Exception, target: Target, label: str) -> InputError | ProviderError:
    reason = native_reason(error)
    if isinstance(error, ort_state.NotImplemented):
        return UnsupportedTypeError(
            f"{label} ({reason})",
            f"operators and element types that {target.provider_name} implements",
            "convert the model to float32, or choose another provider",
        )
    if target.provider != "cpu" and isinstance(error, (RuntimeError, ValueError, ort_state.EPFail)):
        return unloadable(target, reason)
    return InputError(
        f"{label}, which onnxruntime {ort.__version__} cannot load ({reason})",
        "a model that onnxruntime runs",
        "check the file with onnx.checker, or install the onnxruntime that matches it",
    )


def _specs(values: Sequence[Any]) -> tuple[TensorSpec, ...]:
    return tuple(parsed_spec(value.name, value.type, value.shape) for value in values)
