"""Which layers a walk can stop at: one node in the main graph, and a bias that is known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from onnx import NodeProto

from onnx_lowrank.chain import Chain, Fit
from onnx_lowrank.graph.applied import applied
from onnx_lowrank.graph.bias import BiasSlot, bias_slot
from onnx_lowrank.graph.keys import keyed_nodes
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.graph.scope import Scope
from onnx_lowrank.layer import Array, Layer
from onnx_lowrank.row_space import RowSpace


@dataclass(frozen=True, eq=False)
class Stop:
    """A layer the walk stops at.

    Args:
        layer: It.
        operand: Position of the activation among its node's inputs.
        slot: Where its bias lives; None: it has none, and none can be given to it without a new operator.
        in_row_space: Whether moments are those of the row space of its weight: all would not fit into memory.
    """

    layer: Layer
    operand: int
    slot: BiasSlot | None
    in_row_space: bool = False

    @property
    def centred(self) -> bool:
        """Whether the bias takes up means, so that moments about them count."""
        return self.slot is not None

    @cached_property
    def space(self) -> RowSpace | None:
        """The row space that moments are taken in; None: of all inputs."""
        return RowSpace.of(self.layer.read()) if self.in_row_space else None

    def corrected(self, chain: Chain, factors: Iterable[Array], mean: Array) -> Fit:
        """Factors, and what they lose of the mean input given back by the bias: (M - M') E[c].

        Args:
            chain: Their chain.
            factors: Stage weights.
            mean: E[c], (groups, n), or in the row space.
        """
        arrays, shape = tuple(factors), self.layer.shape
        if self.slot is None:
            return Fit(arrays)
        lost = (self.layer.read().astype(np.float64) - chain.dense(arrays)).reshape(shape.groups, shape.out, -1)
        inputs = mean if self.space is None else self.space.mean(mean)
        return Fit(arrays, np.einsum("gsn,gn->gs", lost, inputs).reshape(-1))


def stops(graph: Graph, layers: Iterable[Layer], most: int) -> dict[str, Stop]:
    """Node key -> stop, for every layer the walk can stop at; `obstacles` says why it cannot at the others.

    Args:
        graph: The network.
        layers: Its layers.
        most: Bytes that moments of one layer may take.
    """
    nodes = _in_main(graph)
    found = {layer.nodes[0]: _stop(layer, nodes, most) for layer in layers}
    return {key: stop for key, stop in found.items() if isinstance(stop, Stop)}


def obstacles(graph: Graph, layers: Iterable[Layer], most: int) -> dict[str, str]:
    """Layer key -> why the walk cannot stop at it, in words, for every layer it cannot stop at; see `stops`."""
    nodes = _in_main(graph)
    found = {layer.key: _stop(layer, nodes, most) for layer in layers}
    return {key: why for key, why in found.items() if isinstance(why, str)}


Place = tuple[Scope, NodeProto]


def _in_main(graph: Graph) -> dict[str, Place]:
    return {key: (scope, node) for scope, node, key in keyed_nodes(graph) if scope is graph.main}


def _stop(layer: Layer, nodes: Mapping[str, Place], most: int) -> Stop | str:
    """The stop at a layer, or why there is none."""
    key, shape = layer.nodes[0], layer.shape
    if len(layer.nodes) > 1:  # one weight that meets several inputs
        return f"its weight is used by {len(layer.nodes)} nodes"
    if key not in nodes:
        return "it is in the body of an If, Loop or Scan"
    size = min(shape.inputs, shape.out)
    if (needed := 8 * shape.groups * size**2) > most:
        return f"its moments would take {needed} bytes, and --memory-limit is {most}"
    use = applied(*nodes[key])
    if isinstance(use, str):
        return use
    slot = bias_slot(*nodes[key], use)
    if slot is None and use.form.bias:  # it would be fitted as if it came from the input
        return "its bias is not one constant value per output"
    large = 8 * shape.groups * shape.inputs**2 > most
    return Stop(layer, use.activation_operand, slot, in_row_space=large)
