"""What the numbers of a report depend on."""

from __future__ import annotations

import os
import platform

from onnx_lowrank.latency.machine import processor
from onnx_lowrank.runtime import versions
from onnx_lowrank.target import Target


def environment(target: Target) -> dict[str, object]:
    """Versions, processor, provider and its options, for JSON."""
    return {
        "versions": versions(),
        "cpu": processor().model,
        "cores": os.cpu_count(),
        "os": platform.platform(),
        "provider": target.provider,
        "provider_options": target.options,
    }
