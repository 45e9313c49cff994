"""Tensor networks as chains: a network is contracted with the channels factor by factor, in a given order.

The channels of a layer are cut into modes, one letter each. A link takes some of the letters that are there and gives
others; the letters it does not take are shared: they count as batch meanwhile. Letters stay in the order they come in,
so that channels change places only where what is taken does not stand last.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from onnx_lowrank.chain import Chain, Folded
from onnx_lowrank.contraction import unused
from onnx_lowrank.decomposition import Decomposition, Factorization, Rank
from onnx_lowrank.layer import Array, LayerShape, Shape
from onnx_lowrank.passes.decompose.fitted import Fitted

GROUP = "g"
ON_REQUEST = "its stages are small and its channels move in memory between them, which costs more time than it saves"
NO_GROUPS = "tensor networks are not built for groups yet, svd is"
Algorithm = Callable[[Rank], tuple[Array, ...]]


@dataclass(frozen=True)
class Link:
    """One factor of a network.

    Args:
        takes: Letters it contracts with, in the order of its weight's axes.
        gives: Letters it leaves, likewise.
        carries: Spatial axes whose kernel, stride, dilation and pads it has; what no link carries is the first one's.
    """

    takes: str
    gives: str
    carries: Shape = ()


def network(
    method: str, shape: LayerShape, links: Sequence[Link], inputs: str, outputs: str, sizes: Mapping[str, int]
) -> Chain:
    """The chain of a network.

    Args:
        method: Name of the decomposition.
        shape: The layer; one group.
        links: In order of contraction.
        inputs: Letters of the input channels, major first.
        outputs: Letters of the output channels, major first.
        sizes: Of every letter but the group's.

    Returns:
        Folded stages with weights (1, *gives, *takes, *kernel); all but one letter are free for the caller: "g" is not.
    """
    fresh, axes = unused([*sizes, GROUP]), range(len(shape.kernel))
    there, stages, terms = inputs, list[Folded](), list[str]()
    kernel = [""] * len(axes)
    loose = tuple(axis for axis in axes if not any(axis in link.carries for link in links))
    for number, link in enumerate([replace(links[0], carries=links[0].carries + loose), *links[1:]]):
        held = "".join(letter for letter in there if letter not in link.takes)
        order, given = held + link.takes, held + link.gives
        spatial = [next(fresh) for _ in axes]
        for axis in link.carries:
            kernel[axis] = spatial[axis]
        goal = outputs if number == len(links) - 1 else given
        stages.append(
            Folded.of(
                tuple(sizes[letter] for letter in there),
                tuple(sizes[letter] for letter in link.gives),
                shared=len(held),
                order=tuple(there.index(letter) for letter in order),
                leaves=tuple(given.index(letter) for letter in goal),
                kernel=tuple(k if axis in link.carries else 1 for axis, k in enumerate(shape.kernel)),
                carries=link.carries,
            )
        )
        terms.append(GROUP + link.gives + link.takes + "".join(spatial))
        there = given
    return Chain(method, tuple(stages), f"{','.join(terms)}->{GROUP}({outputs})({inputs}){''.join(kernel)}")


class NetworkFormat(Decomposition):
    """Base of tensor networks: the weight of one group, decomposed by some algorithm for each rank."""

    by_rank: ClassVar[bool] = True

    @abstractmethod
    def algorithm(self, weight: Array) -> Algorithm:
        """What makes the data-free stage weights of a rank, for a weight (1, out, in, *kernel) in float64."""

    def factorize(self, weight: Array, gram: Array | None = None, *, most: Rank | None = None) -> Factorization:  # noqa: ARG002 - nothing is made before it is asked for
        """Nothing is decomposed before a rank is asked for."""
        return _NetworkFit(self, weight, gram)

    def saves(self, shape: LayerShape, rank: Rank) -> bool:
        """Whether the chain has fewer weights, and no more multiply-accumulates where no stage changes the size."""
        stages = self.chain(shape, rank).stages
        work = sum(stage.copies * stage.params for stage in stages)
        return sum(stage.params for stage in stages) < shape.params >= work

    def exact_rank(self, shape: LayerShape) -> Rank | None:  # noqa: ARG002 - the protocol's signature
        """There is one for every way to cut the channels into modes, none for all."""
        return None


class _NetworkFit(Fitted):
    """Fits of one weight by a format's algorithm."""

    def __init__(self, method: NetworkFormat, weight: Array, gram: Array | None) -> None:
        super().__init__(method, weight, gram)
        self._algorithm = method.algorithm(self.weight)

    def fit(self, rank: Rank) -> tuple[Array, ...]:
        """The algorithm's factors."""
        return self._algorithm(rank)

    def exact(self) -> tuple[Array, ...]:
        """Never asked for: no rank is the exact one of all."""
        raise NotImplementedError
