"""TT-matrix: W[o1 .. od, i1 .. id] = G_1[o1 i1] G_2[o2 i2] .. G_d[od id], a product of r_(k-1) x r_k matrices.

Oseledets (SIAM J. Sci. Comput. 2011); of layers: Novikov et al. (NeurIPS 2015). The modes: passes.decompose.modes.
TT-SVD (TensorLy's) makes the cores; the chain contracts the last core first, so that the first product needs no
Transpose. sum r_(k-1) I_k O_k r_k weights. Two cores are a sum of Kronecker products: that is `kronecker`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from tensorly.decomposition import tensor_train_matrix

from onnx_lowrank.chain import Chain
from onnx_lowrank.decomposition import Rank
from onnx_lowrank.layer import Array, LayerShape
from onnx_lowrank.passes.decompose.modes import ModalFormat, Modes
from onnx_lowrank.passes.decompose.network import ON_REQUEST, Link, network

_OUTS, _INS, _BONDS = "ABCD", "abcd", "xyz"


@dataclass(frozen=True)
class TtMatrix(ModalFormat):
    """TT-matrix of three or four cores: Reshape, Transpose and a small MatMul per core, the last core first."""

    name: ClassVar[str] = "tt_matrix"
    on_request: ClassVar[str] = ON_REQUEST

    def bonds(self, modes: Modes) -> Sequence[int]:
        """The smaller side of the unfolding at each cut."""
        sizes = modes.sizes
        return [min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, len(sizes))]

    def chain(self, shape: LayerShape, rank: Rank) -> Chain:
        """A stage per core."""
        count, r = rank
        modes = self.modes(shape, count)
        outs, ins, bonds = _OUTS[:count], _INS[:count], _BONDS[: count - 1]
        sizes = dict(zip(outs + ins, modes.outs + modes.ins, strict=True))
        sizes |= {letter: min(r, limit) for letter, limit in zip(bonds, self.bonds(modes), strict=True)}
        links = [Link(ins[k] + bonds[k : k + 1], outs[k] + bonds[k - 1 : k][:k]) for k in reversed(range(count))]
        return network(self.name, shape, links, ins, outs, sizes)

    def algorithm(self, weight: Array) -> TtSvd:
        """TT-SVD."""
        return TtSvd(weight)


class TtSvd:
    """TT-SVD of one matrix.

    Args:
        weight: (1, S, C, *ones).
    """

    def __init__(self, weight: Array) -> None:
        self._weight = weight

    def __call__(self, rank: Rank) -> tuple[Array, ...]:
        """Cores, the last one first: (1, O_k, r_(k-1), I_k, r_k, *ones), without the ranks at both ends."""
        _, out, in_, *ones = self._weight.shape
        method, count, r = TtMatrix(), *rank
        modes = method.modes(LayerShape(1, out, in_), count)
        ranks = [1, *(min(r, limit) for limit in method.bonds(modes)), 1]
        cores = tensor_train_matrix(self._weight.reshape(modes.outs + modes.ins), rank=ranks).factors
        turned = [np.asarray(core).transpose(1, 0, 2, 3) for core in cores]
        turned[0], turned[-1] = turned[0][:, 0], turned[-1][..., 0]
        return tuple(core.reshape(1, *core.shape, *ones) for core in reversed(turned))
