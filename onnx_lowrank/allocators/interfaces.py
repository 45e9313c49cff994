"""Where a chain is narrow: the channels between its stages, and the unfolding whose rank each of them bounds.

Everything that passes between two stages of a chain is a product of what the earlier ones carry (input channels, some
spatial axes) and what the later ones carry (output channels, the other axes). The channels in between are therefore an
upper bound of the rank of that unfolding of the dense weight, whatever the format.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from onnx_lowrank.chain import Chain
from onnx_lowrank.layer import Shape


@dataclass(frozen=True)
class Interface:
    """The channels between two stages.

    Args:
        channels: How many, in each of the layer's groups.
        carried: Spatial axes that the stages before carry.
    """

    channels: int
    carried: Shape


def interfaces(chain: Chain) -> Iterator[Interface]:
    """Every place between two stages where all channels of the one go into the other."""
    groups = chain.stages[-1].groups
    carried: tuple[int, ...] = ()
    for before, after in pairwise(chain.stages):
        carried += before.carries
        channels = before.groups * before.out
        if channels == after.groups * after.in_:
            yield Interface(channels // groups, tuple(sorted(carried)))


def slices(chain: Chain) -> int:
    """Into how many slices of input channels the first stage divides what one group of the layer reads."""
    return max(chain.stages[0].groups // chain.stages[-1].groups, 1)
