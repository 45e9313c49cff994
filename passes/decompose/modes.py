"""What tensor networks of a matrix share: both sides cut into d modes, one rank for all bonds between the modes.

Outputs and inputs are cut into factors as equal as their primes allow, the largest output mode beside the smallest
input mode. The rank is (d, r): each bond has r, or what makes the cut it stands for exact, if that is less.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from onnx_lowrank.decomposition import Rank, spaced
from onnx_lowrank.layer import LayerShape, Shape
from onnx_lowrank.passes.decompose.network import NO_GROUPS, NetworkFormat

COUNTS = (3, 4)
_RANKS = 8  # of each number of modes


@dataclass(frozen=True)
class Modes:
    """Sizes of the modes of a matrix: outputs o_1 .. o_d and inputs i_1 .. i_d, major first."""

    outs: Shape
    ins: Shape

    @staticmethod
    def of(out: int, in_: int, count: int) -> Modes | None:
        """The matrix cut into `count` modes, or None where a side is no product of so many numbers."""
        outs, ins = cut(out, count), cut(in_, count)
        return None if outs is None or ins is None else Modes(outs, ins[::-1])

    @property
    def sizes(self) -> Shape:
        """Entries of each pair of modes, o_k i_k."""
        return tuple(o * i for o, i in zip(self.outs, self.ins, strict=True))


class ModalFormat(NetworkFormat):
    """Base of tensor networks of a matrix. Subclasses say which bonds there are, and in what order they contract."""

    structure: ClassVar[int] = 1

    @abstractmethod
    def bonds(self, modes: Modes) -> Sequence[int]:
        """For every bond the rank that makes its cut exact."""

    def refusal(self, shape: LayerShape) -> str | None:
        """Refuse kernels, groups, and sides that are not a product of three numbers."""
        if not shape.is_matrix:
            return f"{shape} has a kernel: {self.name} cuts matrices"
        if shape.groups > 1:
            return f"{shape} has groups: {NO_GROUPS}"
        if not self._modes(shape):
            return f"{shape} has a side that is no product of three numbers: kronecker cuts it into two"
        return None

    def ranks(self, shape: LayerShape, block: int) -> Sequence[Rank]:  # noqa: ARG002 - bonds do not fill channel blocks
        """For every number of modes the eight highest ranks that save weights and work."""
        found: list[Rank] = []
        for modes in self._modes(shape):
            pairs = [(len(modes.outs), r) for r in spaced(max(self.bonds(modes)), 1)]
            found += [pair for pair in pairs if self.saves(shape, pair)][-_RANKS:]
        return found

    def misfit(self, shape: LayerShape, rank: Rank) -> str | None:
        """A rank for some number of modes."""
        most = {len(modes.outs): max(self.bonds(modes)) for modes in self._modes(shape)}
        if len(rank) == 2 and 1 <= rank[1] <= most.get(rank[0], 0):
            return None
        return " or ".join(f"{count}x1 to {count}x{limit}" for count, limit in most.items())

    def modes(self, shape: LayerShape, count: int) -> Modes:
        """The layer cut into `count` modes.

        Raises:
            ValueError: if it cannot be.
        """
        found = Modes.of(shape.out, shape.in_, count)
        if found is None:
            raise ValueError(f"got {shape} in {count} modes; expected what `misfit` lets pass")
        return found

    def _modes(self, shape: LayerShape) -> list[Modes]:
        return [modes for count in COUNTS if (modes := Modes.of(shape.out, shape.in_, count))]


def cut(number: int, count: int) -> Shape | None:
    """A number as `count` factors above 1, as equal as its primes allow, descending; None if it is no such product."""
    primes, rest, parts = list[int](), number, [1] * count
    for prime in range(2, number + 1):
        while rest % prime == 0:
            primes.append(prime)
            rest //= prime
    for prime in reversed(primes):
        parts[parts.index(min(parts))] *= prime
    return tuple(sorted(parts, reverse=True)) if min(parts) > 1 else None
