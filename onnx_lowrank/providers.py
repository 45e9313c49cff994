"""Which execution providers work here, asked by running a model of one node."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
from onnx import parser

from onnx_lowrank.errors import InputError, ProviderError
from onnx_lowrank.runtime import Session, open_session
from onnx_lowrank.target import Target

_PROBE = parser.parse_model('<ir_version: 7, opset_import: ["": 13]> one (float[1] x) => (float[1] y) { y = Relu(x) }')


@functools.cache
def provider_reason(provider: str) -> str | None:
    """Why `provider` cannot load here, or None if it does."""
    try:
        _open_probe(Target(provider, threads=1)).run({"x": np.ones(1, np.float32)})
    except (ProviderError, InputError) as error:
        return error.got.partition(" (")[2].removesuffix(")") or error.got
    return None


def require_provider(target: Target) -> None:
    """Fail at once where the provider does not load with its options, before a large model is read for nothing.

    Raises:
        ProviderError: saying what is missing.
    """
    if target.provider != "cpu":
        _open_probe(target)


def _open_probe(target: Target) -> Session:
    # Not strictly: XNNPACK and the like take few operators, and the one here need not be among them.
    return open_session(_PROBE.SerializeToString(), replace(target, allow_fallback=True))
