"""The protocol of every graph pass: a frozen dataclass whose fields are its only options."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from onnx_lowrank.graph.model import Graph


@dataclass(frozen=True)
class Note:
    """One thing a pass did or refused to do, in words."""

    node: str
    text: str


@dataclass(frozen=True)
class PassResult:
    """What a pass reports.

    Args:
        modified: Whether the graph differs from before; the manager checks that this is honest.
        notes: One entry per rewritten (or refused) node.
    """

    modified: bool
    notes: tuple[Note, ...] = ()


class Pass(ABC):
    """A rewrite of the whole graph, in place.

    Subclasses are frozen dataclasses; the command line parses `name{option=value}` from their fields. The first line of
    the class docstring is what `onnx-lowrank passes` prints.
    """

    name: ClassVar[str]

    @abstractmethod
    def run(self, graph: Graph) -> PassResult:
        """Check, then rewrite. Raise `PassError` naming the node where something cannot be right."""
