"""Runs graph passes: valid in, valid out, an honest `modified`, errors that name pass and node."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from onnx import TensorProto

from onnx_lowrank.errors import InvalidResultError, LowRankError, PassError
from onnx_lowrank.graph.check import check
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.transform import Note, Pass, PassResult

_log = logging.getLogger(__name__)
_DO = "leave the pass out with --passes, and report it"


@dataclass(frozen=True)
class PassRecord:
    """What one pass did.

    Args:
        name: The pass.
        options: Its options.
        modified: Whether the graph changed.
        seconds: How long the pass itself took, checks excluded.
        notes: What it did, node by node.
    """

    name: str
    options: dict[str, object]
    modified: bool
    seconds: float
    notes: tuple[Note, ...]


@dataclass(frozen=True)
class PassManager:
    """Runs passes in order on one graph.

    Args:
        passes: The passes.
        checker: Raises `InvalidResultError` where a graph is not valid.
    """

    passes: Sequence[Pass]
    checker: Callable[[Graph], None] = check

    def run(self, graph: Graph) -> list[PassRecord]:
        """Run every pass on `graph`, in place; when one fails, `graph` is what the last good pass left.

        Raises:
            InvalidResultError: if the graph is not valid before the first pass.
            PassError: if a pass fails, leaves an invalid graph, or misreports whether it changed the graph.
        """
        self.checker(graph)
        return [self._run(step, graph) for step in self.passes]

    def _run(self, step: Pass, graph: Graph) -> PassRecord:
        before, valid = _Fingerprint.of(graph), graph.snapshot()
        start = time.perf_counter()
        try:
            result = step.run(graph)
            seconds = time.perf_counter() - start
            self._verify(step, graph, result, before)
        except BaseException as error:
            graph.restore(valid)
            if isinstance(error, LowRankError) or not isinstance(error, Exception):
                raise
            got = f"{type(error).__name__}: {error}"
            raise PassError(step.name, None, got, "a pass that runs through", _DO) from error
        for note in result.notes:
            _log.debug("%s: %s", step.name, note.text)
        _log.info("%s: %s in %.3f s", step.name, "modified" if result.modified else "no change", seconds)
        return PassRecord(
            step.name,
            dict(vars(step)),
            result.modified,
            seconds,
            result.notes,
        )

    def _verify(self, step: Pass, graph: Graph, result: PassResult, before: _Fingerprint) -> None:
        after = _Fingerprint.of(graph)
        if result.modified != (before != after):
            got = f"modified={result.modified} for a graph that " + ("is the same" if before == after else "changed")
            raise PassError(step.name, None, got, "an honest report", _DO)
        if before.signature != after.signature:
            raise PassError(step.name, None, "changed inputs or outputs", "the same signature", _DO)
        if not result.modified:
            return
        try:
            self.checker(graph)
        except InvalidResultError as error:
            raise PassError(step.name, None, error.got, error.expected, _DO) from error


@dataclass(frozen=True)
class _Fingerprint:
    """Enough of a graph to see whether it changed: nodes by value, weights by identity or value, names by name."""

    signature: tuple[tuple[str, ...], tuple[str, ...]]
    nodes: tuple[tuple[str, bytes], ...]
    opset: int
    weights: dict[tuple[str, str], TensorProto]

    @staticmethod
    def of(graph: Graph) -> _Fingerprint:
        """The fingerprint of the present state; keeps the weights alive, so that identity means something."""
        digest = tuple(
            (scope.path, hashlib.sha1(node.SerializeToString(), usedforsecurity=False).digest())
            for scope in graph.scopes()
            for node in scope.nodes
        )
        weights = {(scope.path, name): t for scope in graph.scopes() for name, t in scope.initializers.items()}
        signature = tuple(value.name for value in graph.feeds), tuple(graph.main.outputs)
        return _Fingerprint(signature, digest, graph.opset, weights)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Fingerprint)
            and (self.signature, self.nodes, self.opset) == (other.signature, other.nodes, other.opset)
            and self.weights.keys() == other.weights.keys()
            and all(mine is other.weights[key] or mine == other.weights[key] for key, mine in self.weights.items())
        )

    __hash__ = None  # pyright: ignore[reportAssignmentType]


def bisect(count: int, differs: Callable[[int], bool]) -> int | None:
    """The first of `count` rewrites after which outputs differ, found in about log2(count) comparisons.

    Errors of later rewrites may cancel those of earlier ones, so there may be several such k; the one returned is one
    where `differs` was seen to hold for k and not to hold for k - 1.

    Args:
        count: Number of rewrites, in the order in which they are applied.
        differs: Whether outputs differ from the original's by more than the tolerance after the first k rewrites.

    Returns:
        k in 1..count, or 0 where outputs differ before any rewrite; None if they do not differ with all of them.
    """
    if not differs(count):
        return None
    if differs(0):
        return 0
    same, different = 0, count
    while different - same > 1:
        middle = (same + different) // 2
        if differs(middle):
            different = middle
        else:
            same = middle
    return different
