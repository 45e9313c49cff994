"""The user's model while passes run: protobuf messages in Python lists, never translated into another form.

Whatever a pass does not touch (metadata, doc strings, custom domains, fields of a future ONNX) is written back bit for
bit. Weights kept in external files stay there until they are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, ValueInfoProto

from onnx_lowrank.graph.external import read_tensor
from onnx_lowrank.graph.messages import husk
from onnx_lowrank.graph.scope import MapTensor, Scope
from onnx_lowrank.graph.tensor import DEFAULT_DOMAINS


@dataclass(frozen=True)
class Snapshot:
    """A state `Graph.restore` goes back to. Nodes are copies, weights are shared."""

    model: ModelProto
    main: Scope


@dataclass
class Graph:
    """A model under work. The message it was made from is never edited.

    Args:
        model: The message that was read. After construction: the same without its main graph, which lives in `main`.
        folder: Where relative external data locations start; None for a model built in memory.
        external: Whether the file kept weights in external files; it is saved the same way.
        tolerated: What the checker's strict shape inference found wrong in the model as it was read; see `check`.
        main: The main graph.
    """

    model: ModelProto
    folder: Path | None = None
    external: bool = False
    tolerated: frozenset[str] = frozenset()
    main: Scope = field(init=False)

    def __post_init__(self) -> None:
        """Open the main graph and its bodies."""
        self.reopen(self.model)

    def reopen(self, model: ModelProto) -> None:
        """Go on with another message in place of the current one; all scopes are new afterwards."""
        self.main = Scope(self, model.graph)
        self.model = husk(model, {"graph"})
        self._names: set[str] | None = None

    @property
    def opset(self) -> int:
        """Version of the default operator set."""
        return next((o.version for o in self.model.opset_import if o.domain in DEFAULT_DOMAINS), 1)

    @property
    def feeds(self) -> list[ValueInfoProto]:
        """The inputs a caller must feed: formal inputs of the main graph that have no initializer."""
        return [value for value in self.main.proto.input if value.name not in self.main.initializers]

    def scopes(self) -> Iterator[Scope]:
        """The main graph and every body, outer ones first."""
        queue = [self.main]
        while queue:
            scope = queue.pop(0)
            yield scope
            queue.extend(scope.bodies())

    def array(self, tensor: TensorProto) -> NDArray[np.generic]:
        """Value of a tensor message, read from its external file if it lives there."""
        return read_tensor(tensor, self.folder)

    def free_name(self, wanted: str) -> str:
        """`wanted`, or `wanted_1`, `wanted_2`, ...: a tensor and node name used nowhere; reserved from now on."""
        if self._names is None:
            self._names = set(self._all_names())
        name, number = wanted, 0
        while name in self._names:
            number += 1
            name = f"{wanted}_{number}"
        self._names.add(name)
        return name

    def hide_initializers(self) -> None:
        """Let initializers exist that are no formal inputs: IR version 3 allows none, 4 does.

        From 4 on a listed initializer may be overridden by the caller, which keeps a runtime from folding and fusing
        it. Under 3 nobody could override it, so the list entries go when the version is raised.
        """
        if self.model.ir_version >= 4:
            return
        self.model.ir_version = 4
        feeds = self.feeds
        del self.main.proto.input[:]
        self.main.proto.input.extend(feeds)

    def prune(self) -> None:
        """Drop constants nothing reads any more, formal inputs made for them, and value_info of vanished tensors."""
        for scope in reversed(list(self.scopes())):
            scope.prune()

    def snapshot(self) -> Snapshot:
        """The present state, to go back to with `restore`. Costs a copy of the nodes; weights are shared."""
        model = ModelProto()
        model.CopyFrom(self.model)
        return Snapshot(model, self.main.clone())

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to `snapshot`, which stays usable. Scopes and nodes held from before are out of the graph."""
        self.model = ModelProto()
        self.model.CopyFrom(snapshot.model)
        self.main = snapshot.main.clone()
        self._names = None

    def to_proto(self, map_tensor: MapTensor = lambda tensor: tensor) -> ModelProto:
        """A new message with the current nodes and initializers; `map_tensor` may swap weights for references."""
        model = ModelProto()
        model.CopyFrom(self.model)
        model.graph.CopyFrom(self.main.to_proto(map_tensor))
        return model

    def _all_names(self) -> Iterator[str]:
        for scope in self.scopes():
            yield from scope.inputs
            yield from scope.outputs
            yield from scope.initializers
            yield from (value.name for value in scope.proto.value_info)
            for node in scope.nodes:
                yield node.name
                yield from node.output
                yield from node.input
