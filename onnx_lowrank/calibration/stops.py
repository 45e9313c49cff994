"""Which layers a walk can stop at: one node in the main graph, and a bias that is known."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from onnx_lowrank.chain import Chain, Fit
from onnx_lowrank.graph.applied import applied
from onnx_lowrank.graph.bias import BiasSlot, bias_slot
from onnx_lowrank.graph.keys import keyed_nodes
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.layer import Array, Layer


@dataclass(frozen=True, eq=False)
class Stop:
    """A layer the walk stops at.

    Args:
        layer: It.
        operand: Position of the activation among its node's inputs.
        slot: Where its bias lives; None: it has none, and none can be given to it without a new operator.
    """

    layer: Layer
    operand: int
    slot: BiasSlot | None

    @property
    def centred(self) -> bool:
        """Whether the bias takes up means, so that moments about them count."""
        return self.slot is not None

    def corrected(self, chain: Chain, factors: Iterable[Array], mean: Array) -> Fit:
        """Factors, and what they lose of the mean input given back by the bias: (M - M') E[c].

        Args:
            chain: Their chain.
            factors: Stage weights.
            mean: E[c], (groups, n).
        """
        arrays, shape = tuple(factors), self.layer.shape
        if self.slot is None:
            return Fit(arrays)
        lost = (self.layer.read().astype(np.float64) - chain.dense(arrays)).reshape(shape.groups, shape.out, -1)
        return Fit(arrays, np.einsum("gsn,gn->gs", lost, mean).reshape(-1))


# Moments of one layer; a layer with more inputs than that stays data-free.
MOST_BYTES = 1 << 30


def stops(graph: Graph, layers: Iterable[Layer]) -> dict[str, Stop]:
    """Node key -> stop, for every layer the walk can stop at.

    Left out are layers whose moments would not fit into memory, layers in bodies, layers of several nodes (their one
    weight meets several inputs) and those with a bias that is computed (it would be fitted as if it came from the
    input).
    """
    nodes = {key: (scope, node) for scope, node, key in keyed_nodes(graph) if scope is graph.main}
    found: dict[str, Stop] = {}
    for layer in layers:
        key = layer.nodes[0]
        if len(layer.nodes) > 1 or key not in nodes or 8 * layer.shape.groups * layer.shape.inputs**2 > MOST_BYTES:
            continue
        use = applied(*nodes[key])
        if isinstance(use, str):
            continue
        slot = bias_slot(*nodes[key], use)
        if slot is not None or not use.form.bias:
            found[key] = Stop(layer, use.activation_operand, slot)
    return found
