"""What is asked of providers that cannot load here, and what is said where they are missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from onnx_lowrank import pipeline
from onnx_lowrank.doctor import missing_providers
from onnx_lowrank.errors import LowRankError, ProviderError
from onnx_lowrank.inspection import inspect
from onnx_lowrank.latency.measure import Clock, steady_clock
from onnx_lowrank.placement import Placement, check_capturable, check_options, check_placement, placements
from onnx_lowrank.providers import provider_reason
from onnx_lowrank.settings import Settings
from onnx_lowrank.target import PROVIDERS, Target

CPU = ("CPUExecutionProvider", {})
Options = dict[str, str]


def message(call: Callable[[], object]) -> str:
    with pytest.raises(LowRankError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize(
    ("provider", "given", "asked"),
    [
        ("cpu", {"arena": "1"}, {"arena": "1"}),
        ("cuda", {"prefer_nhwc": "1", "enable_cuda_graph": "1"}, {"prefer_nhwc": "1", "enable_cuda_graph": "1"}),
        ("tensorrt", {"trt_fp16_enable": "1"}, {"trt_fp16_enable": "1"}),
        ("openvino", {}, {"device_type": "CPU", "num_of_threads": "3"}),
        ("openvino", {"num_of_threads": "2"}, {"device_type": "CPU", "num_of_threads": "2"}),
        ("openvino", {"device_type": "GPU"}, {"device_type": "GPU"}),
        ("openvino", {"load_config": "{}"}, {"device_type": "CPU", "load_config": "{}"}),
        ("directml", {"device_id": "1"}, {"device_id": "1"}),
        ("coreml", {"ModelFormat": "MLProgram"}, {"ModelFormat": "MLProgram"}),
        ("xnnpack", {}, {"intra_op_num_threads": "3"}),
        ("xnnpack", {"intra_op_num_threads": "1"}, {"intra_op_num_threads": "1"}),
    ],
)
def test_options_are_passed_through_and_threads_obeyed(provider: str, given: Options, asked: Options) -> None:
    target = Target(provider, 3, provider_options=given)
    assert target.options == asked
    assert target.providers == [(PROVIDERS[provider], asked), *([CPU] if provider != "cpu" else [])]


def test_tensorrt_falls_back_to_cuda_before_the_cpu() -> None:
    options = {"device_id": "1", "trt_fp16_enable": "1"}
    target = Target("tensorrt", 1, provider_options=options, allow_fallback=True)
    assert target.providers == [(PROVIDERS["tensorrt"], options), (PROVIDERS["cuda"], {"device_id": "1"}), CPU]


def test_levels_that_do_not_differ_are_not_tried() -> None:
    assert Target("cuda").levels == Target().levels == ("all", "extended")
    assert Target("openvino").levels == ("basic", "none")
    assert Target("openvino", levels=("all",)).levels == ("all",)


def test_a_pool_of_the_providers_own_is_the_only_one() -> None:
    assert [Target(provider, 4).host_threads for provider in ("cpu", "cuda", "openvino", "xnnpack")] == [4, 4, 1, 1]


@pytest.mark.parametrize(
    ("target", "clock"),
    [
        (Target("cpu", 1), Clock.CPU),
        (Target("cpu", 2), Clock.WALL),
        (Target("openvino", 1), Clock.CPU),
        (Target("openvino", 2), Clock.WALL),
        (Target("openvino", 1, provider_options={"num_of_threads": "2"}), Clock.WALL),
        (Target("openvino", 1, provider_options={"device_type": "GPU"}), Clock.WALL),
        (Target("openvino", 1, provider_options={"load_config": "{}"}), Clock.WALL),
        (Target("cuda", 1), Clock.WALL),
        (Target("xnnpack", 1), Clock.WALL),
    ],
)
def test_the_threads_own_clock_is_read_only_where_that_thread_does_the_work(target: Target, clock: Clock) -> None:
    assert steady_clock(target) is clock


@pytest.mark.parametrize(
    ("provider", "options", "captures"),
    [
        ("cuda", {"enable_cuda_graph": "1"}, True),
        ("cuda", {"enable_cuda_graph": "True"}, True),
        ("cuda", {"enable_cuda_graph": "0"}, False),
        ("cuda", {"trt_cuda_graph_enable": "1"}, False),
        ("tensorrt", {"trt_cuda_graph_enable": "1"}, True),
        ("cpu", {"enable_cuda_graph": "1"}, False),
    ],
)
def test_cuda_graphs_are_recognised(provider: str, options: Options, captures: bool) -> None:
    assert Target(provider, 1, provider_options=options).captures_graph is captures


def test_outputs_of_no_fixed_place_cannot_be_captured() -> None:
    check_capturable(())
    assert message(lambda: check_capturable(["y", "z"])) == (
        "got a CUDA graph of a model whose outputs y, z have another shape than declared; expected outputs of fixed "
        "shape, which a replay can write to; leave out enable_cuda_graph, or give --shape"
    )


def test_options_are_compared_where_the_provider_lists_them() -> None:
    cuda = Target("cuda", 1, provider_options={"use_tf32": "1", "foo": "1"})
    assert message(lambda: check_options(cuda, ["use_tf32", "device_id"])) == (
        "got unknown option foo of provider cuda; expected device_id, use_tf32; correct it"
    )
    check_options(Target("openvino", 1, provider_options={"precision": "FP32"}), [])


def test_a_strict_run_needs_an_onnxruntime_that_tells() -> None:
    with pytest.raises(ProviderError) as caught:
        check_placement(None, b"", Target("cuda", 1), "1.20.0")
    assert str(caught.value) == (
        "got onnxruntime 1.20.0, which does not say which nodes cuda takes; expected onnxruntime 1.24 or newer for a "
        "strict run; install one, or go without the check with --allow-fallback"
    )
    assert check_placement([(PROVIDERS["cuda"], ("Conv", "c"))], b"", Target("cuda", 1), "1.24.0") == ()


def test_placement_counts_operators_by_provider() -> None:
    assigned = [("B", ("Relu", "r")), ("A", ("Conv", "c")), ("A", ("Relu", "s")), ("A", ("Conv", "d"))]
    assert placements(assigned) == (Placement("A", 3, {"Conv": 2, "Relu": 1}), Placement("B", 1, {"Relu": 1}))


def test_a_provider_that_does_not_load_is_told_before_the_model_is_read(tmp_path: Path) -> None:
    missing = next(name for name in ("coreml", "directml", "openvino") if provider_reason(name) is not None)
    settings = Settings(target=Target(missing, threads=1))
    roads: list[Callable[[], object]] = [
        lambda: pipeline.optimize(tmp_path / "nowhere.onnx", tmp_path / "out.onnx", settings),
        lambda: pipeline.plan(tmp_path / "nowhere.onnx", settings),
        lambda: inspect(tmp_path / "nowhere.onnx", settings),
    ]
    for road in roads:
        assert message(road) == (
            f"got provider {missing} that does not load here ({provider_reason(missing)}); expected a working "
            f"{PROVIDERS[missing]}; install what it needs (onnx-lowrank doctor says more), or choose another provider"
        )


def test_doctor_names_the_package_of_a_missing_provider() -> None:
    text = missing_providers(["cpu", "openvino", "directml", "coreml", "xnnpack"]).text
    assert text == "cuda: onnxruntime-gpu; tensorrt: onnxruntime-gpu"
    assert missing_providers(list(PROVIDERS)).text == "this build has all of them"
