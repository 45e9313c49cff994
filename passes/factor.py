"""Factor: realise a plan, replacing each chosen layer by its chain."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from threadpoolctl import threadpool_limits

from onnx_lowrank.chain import Fit
from onnx_lowrank.decomposition import Decomposition, Factorization, Rank
from onnx_lowrank.errors import InputError
from onnx_lowrank.graph.layers import layers
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.layer import Layer
from onnx_lowrank.passes.decompose import decompositions
from onnx_lowrank.plan import Choice, Plan
from onnx_lowrank.rewrite import Replacement, splice
from onnx_lowrank.transform import Note, Pass, PassResult

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Factor(Pass):
    """Replace layers by low-rank chains, as a plan says.

    Args:
        plan: The choices; layers it does not mention are kept.
        methods: The decompositions the plan may name.
        factorizations: Weights already decomposed, by layer key and method; the others are decomposed now.
        fits: Arrays already fitted, by layer key; they go before `factorizations`.
    """

    plan: Plan
    methods: Mapping[str, Decomposition] = field(default_factory=decompositions)
    factorizations: Mapping[tuple[str, str], Factorization] = field(
        default_factory=dict[tuple[str, str], Factorization]
    )
    fits: Mapping[str, Fit] = field(default_factory=dict[str, Fit])
    name: ClassVar[str] = "factor"

    def run(self, graph: Graph) -> PassResult:
        """Splice every chain.

        Raises:
            InputError: for a layer this model does not have, an unknown method, or a rank the layer cannot have; the
                graph is untouched then.
        """
        by_key, chosen = self.checked(graph)
        with threadpool_limits(1):  # as when the candidates were decomposed: the same factors, bit for bit
            flushed = splice(graph, (self._replacement(by_key[choice.key], choice) for choice in chosen))
        for key, count in flushed.items():
            if count:
                log.info("%s: %d denormal weights set to zero", key, count)
        notes = tuple(Note(choice.node, f"{choice.method} at rank {_product(choice.rank)}") for choice in chosen)
        return PassResult(bool(notes), notes)

    def checked(self, graph: Graph) -> tuple[dict[str, Layer], list[Choice]]:
        """The layers of `graph` by key, and the choices that rewrite some of them.

        Raises:
            InputError: as `run` does.
        """
        found, _ = layers(graph, check=False)
        by_key = {layer.key: layer for layer in found}
        chosen = [choice for choice in self.plan.layers if not choice.keeps]
        for choice in chosen:
            self._check(choice, by_key.get(choice.key))
        return by_key, chosen

    def _check(self, choice: Choice, layer: Layer | None) -> None:
        if layer is None:
            raise self._error(choice, "no node", "a key of this model", "make the plan again for this model")
        method = self.methods.get(choice.method)
        if method is None:
            known = ", ".join(sorted(self.methods))
            raise self._error(choice, f"unknown method {choice.method!r}", f"one of {known}", "edit the plan")
        refusal = method.refusal(layer.shape)
        if refusal is not None:
            raise self._error(choice, f"{choice.method} where {refusal}", "another method", "edit the plan")
        expected = method.misfit(layer.shape, choice.rank)
        if expected is not None:
            got = f"rank {_product(choice.rank)}" if choice.rank else "no rank"
            raise self._error(choice, f"{got} of {choice.method}", expected, "edit the plan")

    def _replacement(self, layer: Layer, choice: Choice) -> Replacement:
        method, fit = self.methods[choice.method], self.fits.get(layer.key)
        stamp = {"method": choice.method, "rank": _product(choice.rank), "plan": self.plan.digest}
        if fit is not None:
            return Replacement(layer, method.chain(layer.shape, choice.rank), fit, stamp)
        cut = self.factorizations.get((layer.key, choice.method)) or method.factorize(layer.read())
        return Replacement(layer, method.chain(layer.shape, choice.rank), Fit(cut.factors(choice.rank)), stamp)

    def _error(self, choice: Choice, got: str, expected: str, do: str) -> InputError:
        return InputError(f"{got} for layer {choice.key!r} in the plan", expected, do)


def _product(rank: Rank) -> str:
    return "x".join(map(str, rank))
