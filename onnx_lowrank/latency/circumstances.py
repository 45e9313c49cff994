"""Everything a latency depends on beside the chain: device, provider and options, threads, level, versions, clock."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from importlib import resources
from importlib.resources.abc import Traversable

from onnx_lowrank.latency.machine import fingerprint
from onnx_lowrank.latency.measure import steady_clock
from onnx_lowrank.runtime import versions
from onnx_lowrank.target import PROVIDERS, Target

FALLBACK = "allow_fallback"
"""Stands among the options where nodes that the provider cannot take were allowed to run on the CPU."""


_DECIDING = (
    *("rewrite.py", "folding.py", "micro_model.py", "runtime.py"),
    *("latency/turns.py", "latency/measure.py", "latency/worker.py", "latency/chains.py", "latency/pieces.py"),
    *("latency/blocks.py", "latency/grid.py", "latency/interference.py"),
    *("latency/on_target_sessions.py", "latency/on_target.py"),
)


@functools.cache
def lowered_by() -> str:
    """What lowers chains to nodes and times them: another version may write other nodes, or time otherwise."""
    return f"{versions().get('onnx-lowrank', '')}+{digest_of(resources.files('onnx_lowrank'))}"


def digest_of(package: Traversable) -> str:
    """Short for the sources that decide what is timed for a chain, and how: they change between versions, too."""
    sources = (package.joinpath(*name.split("/")).read_text(encoding="utf-8") for name in _DECIDING)
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()[:8]


@dataclass(frozen=True, order=True)
class Circumstances:
    """Where and how something was timed. Latencies of different circumstances are never mixed.

    Args:
        device: Fingerprint in words: CPU model, instruction sets, what else tells it from its like, accelerator.
        provider: Short name, a key of `PROVIDERS`.
        options: Provider options, sorted by name, and `FALLBACK`.
        threads: Intra-op threads.
        onnxruntime: Its version.
        level: Graph optimization level.
        clock: "cpu" or "wall".
        lowered_by: Version of onnx-lowrank that wrote the nodes, with its sources; see `lowered_by`.
    """

    device: str
    provider: str
    options: tuple[tuple[str, str], ...]
    threads: int
    onnxruntime: str
    level: str
    clock: str
    lowered_by: str

    @staticmethod
    @functools.cache
    def here(target: Target, level: str = "all") -> Circumstances:
        """Those of a measurement made on this machine."""
        mixed = {FALLBACK: "true"} if target.allow_fallback and target.provider != "cpu" else {}
        return Circumstances(
            device=fingerprint(target.provider, target.provider_options),
            provider=target.provider,
            options=tuple(sorted((target.provider_options | mixed).items())),
            threads=target.threads,
            onnxruntime=versions()["onnxruntime"],
            level=level,
            clock=steady_clock(target).value,
            lowered_by=lowered_by(),
        )

    @staticmethod
    def from_dict(raw: Mapping[str, object]) -> Circumstances:
        """The inverse of `to_dict`.

        Raises:
            KeyError, TypeError, ValueError: naming what is missing or wrong.
        """
        options, threads = raw["options"], raw["threads"]
        if not isinstance(options, dict):
            raise TypeError(f"options {options!r}")
        if not isinstance(threads, int) or threads < 1:
            raise ValueError(f"threads {threads!r}")
        words = {name: raw[name] for name in ("device", "provider", "onnxruntime", "level", "clock", "lowered_by")}
        for name, word in words.items():
            if not isinstance(word, str) or (name == "provider" and word not in PROVIDERS):
                raise ValueError(f"{name} {word!r}")
        pairs = tuple(sorted((str(name), str(value)) for name, value in options.items()))  # pyright: ignore[reportUnknownArgumentType]
        return Circumstances(options=pairs, threads=threads, **{name: str(word) for name, word in words.items()})

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {**self.__dict__, "options": dict(self.options)}

    @property
    def digest(self) -> str:
        """Short for all of it, in keys."""
        return hashlib.sha256(repr(astuple(self)).encode()).hexdigest()

    def target(self) -> Target:
        """A target with the same provider, options and threads."""
        options = dict(self.options)
        mixed = options.pop(FALLBACK, None) is not None
        return Target(self.provider, self.threads, provider_options=options, allow_fallback=mixed)

    def at(self, level: str) -> Circumstances:
        """The same at another optimization level."""
        return replace(self, level=level)

    @property
    def label(self) -> str:
        """What the user reads, and chooses by; the level is left out: the tool chooses the best."""
        options = "".join(f", {name}={value}" for name, value in self.options)
        return f"{self.device}, {self.provider}{options}, {self.threads} thread(s), onnxruntime {self.onnxruntime}"
