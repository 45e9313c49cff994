"""What of a layer is shown beside each other: within the budget still, when it is timed again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import pytest
from tables import conv_layer

from onnx_lowrank.candidates import keep
from onnx_lowrank.chain import Chain
from onnx_lowrank.comparison.layers import compared_layers
from onnx_lowrank.goals import Speedup
from onnx_lowrank.latency.chains import ChainTimer, Progress, Share
from onnx_lowrank.latency.pieces import Job
from onnx_lowrank.progress import Phases
from onnx_lowrank.search.table import Row


@dataclass
class Again:
    """Times chains again: these shares of their layer, in turn."""

    found: Sequence[float | None]

    def shares(self, jobs: Sequence[Job], progress: Progress | None = None) -> list[Share | None]:
        del progress
        assert len(jobs) == 1 + len(self.found)
        return [None if share is None else Share(1.0, share, (share, share)) for share in (1.0, *self.found)]


@pytest.mark.parametrize(
    ("again", "rank", "beyond"),
    [
        ((0.49, 0.4), 2, False),
        ((0.53, 0.4), 1, False),
        ((0.53, 0.51), 1, True),
        ((0.53, None), 2, True),
        ((None, 0.4), 1, False),
    ],
)
def test_in_place_of_what_is_beyond_a_budget_of_speed_a_smaller_one_is_shown(
    again: Sequence[float | None], rank: int, beyond: bool
) -> None:
    layer = conv_layer("l", np.zeros((1, 8, 8, 3, 3), np.float32))
    kept, chain = keep(layer).timed(1.0), Chain.unfactored(layer.shape)
    times = {1: 0.4, 2: 0.48, 3: 0.6}
    options = [replace(kept, method="svd", chain=chain, rank=(r,), ms=ms, error=1 - ms) for r, ms in times.items()]
    timer = cast("ChainTimer", Again(again))
    (found,) = compared_layers([Row(layer, (kept, *options), {})], [Speedup(2)], timer, None, Phases())
    (shown,) = found.contenders
    assert (shown.rank, shown.beyond) == ((rank,), beyond)
    assert shown.of_layer == again[2 - rank]
