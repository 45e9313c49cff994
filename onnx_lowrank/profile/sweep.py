"""What a benchmark goes through: every combination of threads, batch and optimization level."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, replace

from onnx_lowrank.errors import InputError
from onnx_lowrank.target import ALL_LEVELS, Target


@dataclass(frozen=True)
class Configuration:
    """One combination.

    Args:
        target: With its threads, and the levels of which each model runs at the best.
        batch: Size of the batch, or None: as the shapes say.
    """

    target: Target
    batch: int | None


@dataclass(frozen=True)
class Sweep:
    """Values to combine; where there are none, the target decides.

    Args:
        threads: Intra-op threads; 0 means one per core.
        batches: Sizes of the batch.
        levels: Graph optimization levels, each on its own; without any, every model runs at its best level.

    Raises:
        InputError: for a value out of range.
    """

    threads: tuple[int, ...] = ()
    batches: tuple[int, ...] = ()
    levels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        for option, values, least in (("--threads", self.threads, 0), ("--batch", self.batches, 1)):
            if any(value < least for value in values):
                raise _refused(option, ",".join(map(str, values)), least)
        for level in self.levels:
            if level not in ALL_LEVELS:
                raise InputError(
                    f"--levels {','.join(self.levels)} with the unknown level {level!r}",
                    f"levels of {', '.join(ALL_LEVELS)}, separated by commas",
                    "name some of these",
                )

    def configurations(self, target: Target) -> list[Configuration]:
        """Every combination, threads slowest, levels fastest; none twice."""
        threads = self.threads or (target.threads,)
        levels = [(level,) for level in self.levels] or [target.levels]
        combined = itertools.product(threads, self.batches or (None,), levels)
        return list(
            dict.fromkeys(
                Configuration(replace(target, threads=count, levels=tried), batch) for count, batch, tried in combined
            )
        )


def left_open(target: Target) -> str:
    """A sentence on the provider options that `optimize` would choose by timing; empty where there are none."""
    tried = [variant.provider_options for variant in target.variants()]
    named = [f"{key}={value}" for options in tried for key, value in options.items()]
    differing = [option for option in dict.fromkeys(named) if named.count(option) < len(tried)]
    if not differing:
        return ""
    return (
        "Provider options that are not given are onnxruntime's defaults; optimize also tries "
        f"{' and '.join(differing)}, and its report names the faster: --provider-option takes it here."
    )


def parse_sweep(threads: str | None, batch: str | None, levels: str | None) -> Sweep:
    """Read the options `--threads 1,2 --batch 1,8 --levels all,extended`; None where one is not given.

    Raises:
        InputError: for a list that is malformed, or holds a value out of range.
    """
    named = tuple(level.strip() for level in levels.split(",")) if levels is not None else ()
    return Sweep(_numbers("--threads", threads, 0), _numbers("--batch", batch, 1), named)


def _numbers(option: str, text: str | None, least: int) -> tuple[int, ...]:
    if text is None:
        return ()
    words = [word.strip() for word in text.split(",")]
    if not all(re.fullmatch("[0-9]{1,9}", word) for word in words):
        raise _refused(option, text, least)
    return tuple(map(int, words))


def _refused(option: str, text: str, least: int) -> InputError:
    meaning = "0 (all cores)" if least == 0 else str(least)
    return InputError(f"{option} {text}", f"whole numbers from {meaning} on, separated by commas", "write it like 1,2")
