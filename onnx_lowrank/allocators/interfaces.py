"""Where a chain is narrow: the channels between its stages, and the unfolding whose rank each of them bounds.

Everything that passes between two stages of a chain is a product of what the earlier ones carry (input channels, some
spatial axes) and what the later ones carry (output channels, the other axes). The channels in between are therefore an
upper bound of the rank of that unfolding of the dense weight, whatever the format.
"""

from __future__ import annotations

import math
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
        full_rank: The smaller side of the unfolding: more channels than that hold nothing more.
    """

    channels: int
    carried: Shape
    full_rank: int


def interfaces(chain: Chain) -> Iterator[Interface]:
    """Every place between two stages; channels of a stage that is shared over modes count once per copy."""
    groups, (first, last) = _groups(chain), (chain.stages[0], chain.stages[-1])
    rows, columns = (first.groups * first.in_ * first.copies, last.groups * last.out * last.copies)
    kernel = [math.prod(sizes) for sizes in zip(*(stage.kernel for stage in chain.stages), strict=True)]
    carried: tuple[int, ...] = ()
    for before, _ in pairwise(chain.stages):
        carried += before.carries
        inside = math.prod(size for axis, size in enumerate(kernel) if axis in carried)
        full = min(rows // groups * inside, columns // groups * (math.prod(kernel) // inside))
        yield Interface(before.groups * before.out * before.copies // groups, tuple(sorted(carried)), full)


def of_blocks(chain: Chain) -> bool:
    """Whether some stage holds blocks only: it has more groups than the layer, or is shared over modes.

    Channels beside it may outnumber any rank of the weight and still hold little of it, so that they do not compare
    with those of other formats.
    """
    return any(stage.groups > _groups(chain) or stage.copies > 1 for stage in chain.stages)


def narrowest(chain: Chain) -> float:
    """Channels between the stages where they are fewest, as a share of the full rank of the unfolding they bound.

    Infinite for a chain of one stage.
    """
    return min((place.channels / place.full_rank for place in interfaces(chain)), default=math.inf)


def slices(chain: Chain) -> int:
    """Into how many slices of input channels the first stage divides what one group of the layer reads."""
    return chain.stages[0].groups // _groups(chain)


def _groups(chain: Chain) -> int:
    """The layer's groups: every stage has a multiple of them."""
    return min(stage.groups for stage in chain.stages)
