"""Hierarchical Tucker of a matrix: leaves U_k[o_k i_k, r_k], and transfer tensors B[r_left, r_right, r] up a tree.

Grasedyck (SIAM J. Matrix Anal. 2010); of layers: Yin et al. (CVPR 2021). The tree is balanced over the modes
(passes.decompose.modes). The basis of a node spans the leading left singular vectors of the weight unfolded with the
node's modes as rows; a transfer tensor writes it in the bases of the two nodes below.

The chain walks the tree from the first leaf on: a leaf maps i_k (and its bond, coming from above) to o_k, a transfer
tensor takes the bond it comes from to the other two. Weights: those of the leaves and of the transfer tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from onnx_lowrank.chain import Chain
from onnx_lowrank.decomposition import Rank
from onnx_lowrank.layer import Array, LayerShape
from onnx_lowrank.linalg import spectrum
from onnx_lowrank.passes.decompose.modes import ModalFormat, Modes
from onnx_lowrank.passes.decompose.network import ON_REQUEST, Link, network

_OUTS, _INS, _BONDS = "ABCD", "abcd", "nopqrstuvw"


@dataclass(frozen=True)
class Node:
    """A node of the balanced tree: modes `start` to `stop` of a matrix, and the letter of the bond to what is above."""

    start: int
    stop: int
    bond: str = ""

    @cached_property
    def children(self) -> tuple[Node, Node] | None:
        """The two halves; None of a leaf."""
        count, middle = self.stop - self.start, (self.start + self.stop) // 2
        if count == 1:
            return None
        # A tree of m leaves has 2 m - 1 nodes: as many letters after this node's are the left half's.
        first = _BONDS.index(self.bond) + 1 if self.bond else 0
        second = first + 2 * (middle - self.start) - 1
        return Node(self.start, middle, _BONDS[first]), Node(middle, self.stop, _BONDS[second])

    @cached_property
    def letters(self) -> str:
        """Axes of the node's factor: outputs, inputs, bond above of a leaf; the bonds left, right, above of others."""
        if self.children is None:
            return _OUTS[self.start] + _INS[self.start] + self.bond
        return self.children[0].bond + self.children[1].bond + self.bond

    def walk(self, *, entered: bool = False) -> Iterator[tuple[Node, Link]]:
        """The nodes in the order they are contracted in; `entered`: the channels hold the bond from above already."""
        if self.children is None:
            modes = _INS[self.start], _OUTS[self.start]
            yield self, Link(modes[0] + self.bond, modes[1]) if entered else Link(modes[0], modes[1] + self.bond)
            return
        left, right = self.children
        if entered:
            yield self, Link(self.bond, left.bond + right.bond)
            yield from left.walk(entered=True)
        else:
            yield from left.walk()
            yield self, Link(left.bond, right.bond + self.bond)
        yield from right.walk(entered=True)

    def limit(self, modes: Modes) -> int:
        """The smaller side of the unfolding with the node's modes as rows."""
        inside = math.prod(modes.sizes[self.start : self.stop])
        return min(inside, math.prod(modes.sizes) // inside)


@dataclass(frozen=True)
class HierarchicalTucker(ModalFormat):
    """Hierarchical Tucker of three or four modes: leaves and transfer tensors, contracted along a balanced tree."""

    name: ClassVar[str] = "hierarchical_tucker"
    on_request: ClassVar[str] = ON_REQUEST

    def bonds(self, modes: Modes) -> Sequence[int]:
        """The smaller side of the unfolding of every node but the root."""
        return [node.limit(modes) for node, _ in Node(0, len(modes.outs)).walk() if node.bond]

    def chain(self, shape: LayerShape, rank: Rank) -> Chain:
        """A stage per leaf and transfer tensor."""
        count, r = rank
        modes, walk = self.modes(shape, count), list(Node(0, count).walk())
        outs, ins = _OUTS[:count], _INS[:count]
        sizes = dict(zip(outs + ins, modes.outs + modes.ins, strict=True))
        sizes |= {node.bond: min(r, node.limit(modes)) for node, _ in walk if node.bond}
        return network(self.name, shape, [link for _, link in walk], ins, outs, sizes)

    def algorithm(self, weight: Array) -> Hosvd:
        """The bases of all nodes, once for every number of modes."""
        return Hosvd(weight)


class Hosvd:
    """Hierarchical singular value decomposition of one matrix; the bases of the last number of modes are kept.

    Args:
        weight: (1, S, C, *ones).
    """

    def __init__(self, weight: Array) -> None:
        self._weight = weight
        self._made: dict[int, dict[Node, Array]] = {}

    def __call__(self, rank: Rank) -> tuple[Array, ...]:
        """Leaves and transfer tensors in the order of the walk: (1, *what they give, *what they take, *ones)."""
        count, r = rank
        modes = HierarchicalTucker().modes(LayerShape(1, *self._weight.shape[1:3]), count)
        walk = list(Node(0, count).walk())
        if count not in self._made:
            self._made = {count: {node: self._basis(node, modes) for node, _ in walk}}
        bases = {node: basis[:, : min(r, basis.shape[1])] for node, basis in self._made[count].items()}
        found: list[Array] = []
        for node, link in walk:
            axes = link.gives + link.takes
            array = _factor(node, bases, modes).transpose([node.letters.index(letter) for letter in axes])
            found.append(array.reshape(1, *array.shape, *self._weight.shape[3:]))
        return tuple(found)

    def _basis(self, node: Node, modes: Modes) -> Array:
        """Orthonormal left singular vectors of the node's unfolding, dominant first; of the root the weight itself."""
        count = len(modes.outs)
        split = self._weight.reshape(modes.outs + modes.ins)
        pairs = split.transpose([axis for k in range(count) for axis in (k, k + count)]).reshape(modes.sizes)
        if not node.bond:
            return pairs.reshape(-1, 1)
        rows = np.moveaxis(pairs, range(node.start, node.stop), range(node.stop - node.start))
        cut = spectrum(rows.reshape(1, math.prod(modes.sizes[node.start : node.stop]), -1))
        return cut.vectors[0] if cut.left else np.linalg.qr(cut.truncated(cut.values.shape[1])[0][0])[0]


def _factor(node: Node, bases: dict[Node, Array], modes: Modes) -> Array:
    """The factor of a node, axes as `Node.letters` has them."""
    basis = bases[node]
    if node.children is None:
        return basis.reshape(modes.outs[node.start], modes.ins[node.start], -1)
    left, right = (bases[child] for child in node.children)
    transfer = np.einsum("ax,by,abp->xyp", left, right, basis.reshape(len(left), len(right), -1), optimize=True)
    return transfer if node.bond else transfer[..., 0]
