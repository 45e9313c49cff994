"""Fits whose first stage mixes the input channels alone: they go on in the metric of the channels before samples count.

With H = R R^T the mean of the second moment G over the taps, the fit of W in the metric of H is the same fit of W R,
whose first stage is B R: the format's own sweeps serve. The features T (see `fitted`) are taken from these factors
where they explain far more than the data-free ones, else from either: what errs less after the sweep.

HED's conv4_2 in 128 terms of `cp`: data-free .356, solved and swept .142, five sweeps in the metric of channels before
that .127; fits from the beginning in that metric take as long as data-free ones, and ended at .129.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from onnx_lowrank.chain import Chain
from onnx_lowrank.decomposition import Rank
from onnx_lowrank.layer import Array
from onnx_lowrank.passes.decompose.fitted import Fitted, Made
from onnx_lowrank.passes.decompose.whitened import Channels

IN_CHANNELS = 5  # sweeps in the metric of the input channels; forty leave 1 % less
_FAR = 0.75  # of the energy left by data-free features: at .79 one sweep still turned the order round


class MixingFit(Fitted):
    """Fits that can go on in the metric of the input channels; arguments as those of `Fitted`."""

    @abstractmethod
    def in_channels(self, rank: Rank, factors: Sequence[Array], channels: Channels) -> tuple[Array, ...]:
        """Data-free factors after a few sweeps in the metric of the input channels."""

    @cached_property
    def _channels(self) -> Channels:
        assert self._gram is not None  # noqa: S101 - asked for by `_calibrated` alone
        return Channels(self.weight, self._gram)

    def _calibrated(self, rank: Rank, chain: Chain, factors: tuple[Array, ...], gram: Array) -> Made:
        """Factors for the outputs, from data-free features or from those of the channels' metric, group by group.

        Where the latter explain little more the sweep over all stages may turn the order round: both are tried.
        """
        found, explained = self._solved(chain, factors, gram)
        other, more = self._solved(chain, self.in_channels(rank, factors, self._channels), gram)
        if explained is None or more is None or not self.usable(rank, other):
            return self._refined(rank, chain, found, gram)
        far = self._energies - more < _FAR * (self._energies - explained)
        swept = self._refined(rank, chain, other, gram)
        if far.all():
            return swept
        plain = self._refined(rank, chain, found, gram)
        better = far | (swept[1] < plain[1])
        mixed = _picked(chain, better, swept[0], plain[0])
        if self.usable(rank, mixed):
            return mixed, np.where(better, swept[1], plain[1])
        return plain if self.usable(rank, plain[0]) else swept


def _picked(chain: Chain, first: Array, ours: Sequence[Array], theirs: Sequence[Array]) -> tuple[Array, ...]:
    """`ours` in the groups where `first` holds, `theirs` in the others."""
    group, pairs = chain.axes[0], zip(chain.apart(ours), chain.apart(theirs), strict=True)
    return tuple(
        np.where(first.reshape([-1 if letter == group else 1 for letter in letters]), *pair).reshape(stage.weight)
        for letters, pair, stage in zip(chain.letters[0], pairs, chain.stages, strict=True)
    )
