"""Provider options the user left open, chosen by timing the original with each: a wrong one may cost tenfold."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from onnx_lowrank.latency.race import race_targets
from onnx_lowrank.progress import Phases
from onnx_lowrank.runtime import UnsupportedTypeError
from onnx_lowrank.search.racer import Sample
from onnx_lowrank.settings import Settings

logger = logging.getLogger(__name__)
SECONDS = 4.0


def tuned(path: Path, samples: Sequence[Sample], settings: Settings, phases: Phases) -> Settings:
    """Settings whose target says all options that matter; they then stand in the latency table and the report.

    Args:
        path: The original.
        samples: What to run on.
        settings: As given.
        phases: Timed and shown.

    Raises:
        InputError, ProviderError: if the model does not run on the target.
    """
    variants = settings.target.variants()
    best = variants[0]
    if len(variants) > 1:
        weighted = [(sample.feeds, sample.weight) for sample in samples]
        with phases.phase("provider options"):
            try:
                timed = race_targets(path, settings.target.levels[0], variants, weighted, SECONDS)
            except UnsupportedTypeError as error:
                logger.info("provider options are not tried: %s", error)
            else:
                best = variants[min(range(len(variants)), key=lambda i: timed.timings[i].median_ms)]
    return replace(settings, target=best)
