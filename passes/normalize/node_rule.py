"""The loop most graph passes share: look at every node of every scope, rewrite where the rule applies."""

from __future__ import annotations

from abc import abstractmethod
from typing import TypeVar

from onnx import NodeProto, helper

from onnx_lowrank.errors import LowRankError, PassError
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.graph.scope import Scope
from onnx_lowrank.graph.tensor import DEFAULT_DOMAINS
from onnx_lowrank.transform import Note, Pass, PassResult

Scalar = TypeVar("Scalar", int, float, str)


class NodeRule(Pass):
    """A pass that looks at one node, and the nodes around it, at a time."""

    @abstractmethod
    def rewrite(self, scope: Scope, node: NodeProto) -> Note | None:
        """Rewrite around `node` and say what was done, or leave everything as it is and return None."""

    def run(self, graph: Graph) -> PassResult:
        """Apply the rule to every node, in graph order, as often as it applies."""
        notes: list[Note] = []
        for scope in list(graph.scopes()):
            alive = {id(node) for node in scope.nodes}
            for node in list(scope.nodes):
                while id(node) in alive and (note := self._rewrite(scope, node)) is not None:
                    notes.append(note)
                    alive = {id(node) for node in scope.nodes}
        if notes:
            graph.prune()
        return PassResult(bool(notes), tuple(notes))

    def _rewrite(self, scope: Scope, node: NodeProto) -> Note | None:
        if node.domain not in DEFAULT_DOMAINS:
            return None
        try:
            return self.rewrite(scope, node)
        except LowRankError:
            raise
        except Exception as error:  # whatever goes wrong in a rule, the user must learn at which node
            got, do = f"{type(error).__name__}: {error}", "leave the pass out with --passes, and report it"
            raise PassError(self.name, label(node), got, "a rewrite or none", do) from error


def label(node: NodeProto) -> str:
    """What to call a node in a sentence: its name, or its first output where it has none."""
    return node.name or next(iter(node.output), "")


def attribute(node: NodeProto, name: str, default: Scalar) -> Scalar:
    """Value of a scalar attribute, `default` where it is not set."""
    for item in node.attribute:
        if item.name == name:
            value = helper.get_attribute_value(item)
            return type(default)(value.decode() if isinstance(value, bytes) else value)
    return default


def attribute_ints(node: NodeProto, name: str) -> tuple[int, ...]:
    """Value of a list attribute, empty where it is not set."""
    return next((tuple(item.ints) for item in node.attribute if item.name == name), ())


def drop_attribute(node: NodeProto, name: str) -> None:
    """Remove an attribute, so that its default holds."""
    kept = [item for item in node.attribute if item.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)
