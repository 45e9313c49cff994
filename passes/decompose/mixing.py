"""Fits whose first stage mixes the input channels alone: they go on in the metric of the channels before samples count.

With H = R R^T the mean of the second moment G over the taps, the fit of W in the metric of H is the same fit of W R,
whose first stage is B R: the format's own sweeps serve. The features T (see `fitted`) are taken from these factors or
from the data-free ones, group by group: what errs less after the sweep over all stages, which may turn the order round
(of 120 random layers in two, where the former had left two thirds of the energy that the latter had).

HED's conv4_2 in 128 terms of `cp`: data-free .356, solved and swept .142, five sweeps in the metric of channels before
that .127; fits from the beginning in that metric take as long as data-free ones, and ended at .129.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.chain import Chain
from onnx_lowrank.decomposition import Rank
from onnx_lowrank.layer import Array
from onnx_lowrank.passes.decompose.fitted import Fitted, Made
from onnx_lowrank.passes.decompose.whitened import Channels

IN_CHANNELS = 5  # sweeps in the metric of the input channels; forty leave 1 % less


class MixingFit(Fitted):
    """Fits that can go on in the metric of the input channels; arguments as those of `Fitted`."""

    @abstractmethod
    def in_channels(self, rank: Rank, factors: Sequence[Array], channels: Channels) -> tuple[Array, ...]:
        """Data-free factors after a few sweeps in the metric of the input channels."""

    @cached_property
    def _channels(self) -> Channels:
        assert self._gram is not None  # noqa: S101 - asked for by `_calibrated` alone
        return Channels(self.weight, self._gram)

    def __getstate__(self) -> dict[str, object]:
        """Without what can be made again."""
        return {name: value for name, value in self.__dict__.items() if name != "_channels"}

    def _calibrated(self, rank: Rank, chain: Chain, factors: tuple[Array, ...], gram: Array) -> Made:
        """Factors for the outputs, from data-free features or from those of the channels' metric, group by group."""
        plain = self._refined(rank, chain, self._solved(chain, factors, gram), gram)
        other = self._solved(chain, self.in_channels(rank, factors, self._channels), gram)
        if not self.usable(rank, other):
            return plain
        swept = self._refined(rank, chain, other, gram)
        better = swept[1] < plain[1]
        mixed = _picked(chain, better, swept[0], plain[0]), np.where(better, swept[1], plain[1])
        usable = [made for made in (mixed, swept, plain) if self.usable(rank, made[0])]
        return min(usable or [plain], key=lambda made: float(made[1].sum()))


def _picked(
    chain: Chain, first: NDArray[np.bool_], ours: Sequence[Array], theirs: Sequence[Array]
) -> tuple[Array, ...]:
    """`ours` in the groups where `first` holds, `theirs` in the others."""
    group, pairs = chain.axes[0], zip(chain.apart(ours), chain.apart(theirs), strict=True)
    return tuple(
        np.where(first.reshape([-1 if letter == group else 1 for letter in letters]), *pair).reshape(stage.weight)
        for letters, pair, stage in zip(chain.letters[0], pairs, chain.stages, strict=True)
    )
