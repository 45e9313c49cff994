"""A walk through a network, layer by layer, with the activations of all samples carried along.

The main graph is cut at the layers. Beyond cut j a tensor's *level* is the number of the last cut it depends on, so
that everything of level j or lower can be computed once layers 1..j are known. The walk holds the *front*: tensors of
level <= j that something beyond still reads. One step runs the part of the graph between two fronts, so that the whole
walk costs about one forward pass, and what layer j + 1 reads is always in the front.

The front lies in files (their pages are the operating system's to keep or drop), one per tensor and batch.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_lowrank.errors import InputError
from onnx_lowrank.graph.extract import extract, reads
from onnx_lowrank.graph.keys import keyed_nodes
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.graph.scope import Scope
from onnx_lowrank.graph.tensor import DEFAULT_DOMAINS, is_constant
from onnx_lowrank.runtime import Session, open_session
from onnx_lowrank.signature import Feeds
from onnx_lowrank.target import Target

logger = logging.getLogger(__name__)
Values = NDArray[Any]
Hear = Callable[[int, Values], None]
CONSTANT = -1
# The number of the front in which nothing but the inputs is known, so that every output that depends on them is beyond.
INPUTS = CONSTANT


class CannotCutError(Exception):
    """A tensor that would have to be carried is no array of numbers (a sequence, a map, text)."""


@dataclass(frozen=True)
class Cut:
    """One node of the main graph at which the walk stops.

    Args:
        key: The node's key.
        x: The activation it reads.
        y: What it writes.
        beside: What is added to y and is known before it: the other branch of a residual sum, or what is broadcast
            over y; None if there is none.
        relu: Whether a ReLU follows, with nothing in between but such a sum.
    """

    key: str
    x: str
    y: str
    beside: str | None = None
    relu: bool = False


@dataclass(frozen=True)
class Route:
    """Cuts in graph order and the front behind each of them; the same for every model with these tensors.

    Args:
        cuts: Cuts 1, 2, ....
        fronts: Names of the tensors held after cut 0 (nothing but the inputs known), 1, 2, ....
        outputs: The graph's outputs and their levels.
    """

    cuts: tuple[Cut, ...]
    fronts: tuple[tuple[str, ...], ...]
    outputs: Mapping[str, int]

    def beyond(self, number: int) -> list[str]:
        """Outputs that are computed from front `number`."""
        return [name for name, level in self.outputs.items() if level > number]


def route(graph: Graph, operands: Mapping[str, int]) -> Route:
    """Where to stop.

    Args:
        graph: The model.
        operands: Node key -> position of the activation, for every node to stop at; those in bodies are left out.
    """
    scope, uses = graph.main, reads(graph.main)
    keys = {id(node): key for at, node, key in keyed_nodes(graph) if at is scope}
    levels = {value.name: 0 for value in graph.feeds}
    cuts: list[Cut] = []
    last_use: dict[str, int] = {}
    for node in scope.nodes:
        read, key = uses[id(node)], keys[id(node)]
        level = CONSTANT if is_constant(node) else max((levels.get(name, CONSTANT) for name in read), default=0)
        if key in operands and level != CONSTANT:
            cuts.append(Cut(key, node.input[operands[key]], node.output[0]))
            level = len(cuts)
        for name in read:
            last_use[name] = max(last_use.get(name, 0), level)
        levels.update({name: level for name in node.output if name})
    fronts = tuple(
        tuple(name for name, level in levels.items() if CONSTANT < level <= j < last_use.get(name, 0))
        for j in range(len(cuts) + 1)
    )
    outputs = {name: levels.get(name, CONSTANT) for name in scope.outputs}
    return Route(tuple(_sum(scope, cut, fronts[j]) for j, cut in enumerate(cuts)), fronts, outputs)


def _sum(scope: Scope, cut: Cut, front: Collection[str]) -> Cut:
    """The cut with the residual sum its output goes into, if the other branch is known, and the ReLU behind."""
    at, beside, biased = cut.y, None, False
    while (node := scope.sole_consumer(at)) is not None and node.op_type == "Add" and node.domain in DEFAULT_DOMAINS:
        other = node.input[1] if node.input[0] == at else node.input[0]
        if scope.constant_source(other) is not None:
            biased = True
        elif beside is None and other in front:
            beside = other
        else:
            break
        at = node.output[0]
    relu = node is not None and node.op_type == "Relu" and node.domain in DEFAULT_DOMAINS
    return replace(cut, beside=beside, relu=relu and not biased)


class Front:
    """Values of the tensors of one network that are known so far, batch by batch, in files.

    Args:
        folder: An empty folder of its own.
        target: Where parts of the network run.
    """

    def __init__(self, folder: Path, target: Target) -> None:
        self._folder, self._target = folder, target
        self._files: dict[str, list[Path]] = {}
        self._types: dict[str, int] = {}
        self._number = 0

    @property
    def types(self) -> Mapping[str, int]:
        """Element type of every tensor held."""
        return self._types

    def sizes(self) -> dict[str, list[int]]:
        """Bytes of every tensor held, batch by batch."""
        return {name: [path.stat().st_size for path in paths] for name, paths in self._files.items()}

    def batches(self) -> int:
        """How many batches there are."""
        return len(next(iter(self._files.values()), ()))

    def put(self, feeds: Feeds) -> None:
        """Take in one more batch of named values."""
        for name, value in feeds.items():
            self._append(name, value)

    def value(self, name: str, batch: int) -> Values:
        """One tensor of one batch."""
        return np.load(self._files[name][batch])

    def shape(self, name: str, batch: int) -> tuple[int, ...]:
        """Its shape; the values are not read."""
        return np.load(self._files[name][batch], mmap_mode="r").shape

    def open(self, graph: Graph, wanted: Sequence[str]) -> Session:
        """The part of `graph` that computes `wanted` from what is held."""
        part = extract(graph, self._types, wanted)
        return open_session(part.SerializeToString(), self._target, self._target.levels[0], folder=graph.folder)

    def run(self, session: Session, batches: Collection[int] | None = None) -> Iterator[tuple[int, dict[str, Values]]]:
        """Outputs of a part, batch by batch.

        Args:
            session: From `open`.
            batches: Which ones; None for all.
        """
        names = [spec.name for spec in session.signature.inputs]
        for batch in range(self.batches()) if batches is None else sorted(batches):
            yield batch, session.run({name: self.value(name, batch) for name in names})

    def advance(self, graph: Graph, names: Collection[str], tap: str | None = None, hear: Hear | None = None) -> None:
        """Hold `names` and nothing else, computing with `graph` what is not held yet.

        Args:
            graph: The network, or one with the same tensors.
            names: What to hold.
            tap: A tensor that is computed on the way.
            hear: Told its value, batch by batch.
        """
        missing = [name for name in names if name not in self._files]
        wanted = missing if tap is None or tap in missing else [*missing, tap]
        if wanted:
            session = self.open(graph, wanted)
            made: dict[str, list[Path]] = {name: [] for name in missing}
            for batch, outputs in self.run(session):
                for name in missing:
                    made[name].append(self._write(name, outputs[name]))
                if tap is not None and hear is not None:
                    hear(batch, outputs[tap])
            self._files.update(made)
        for name in set(self._files) - set(names):
            for path in self._files.pop(name):
                path.unlink()
            del self._types[name]

    def _append(self, name: str, value: Values) -> None:
        self._files.setdefault(name, []).append(self._write(name, value))

    def _write(self, name: str, value: Values) -> Path:
        if not isinstance(value, np.ndarray) or value.dtype.hasobject:  # pyright: ignore[reportUnnecessaryIsInstance] - sequences are lists
            kind = "text" if isinstance(value, np.ndarray) else type(value).__name__  # pyright: ignore[reportUnnecessaryIsInstance]
            raise CannotCutError(f"{name!r} holds a {kind}, not an array of numbers")
        self._types[name] = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
        self._number += 1
        path = self._folder / f"{self._number}.npy"
        try:
            np.save(path, value)
        except OSError as error:
            free = shutil.disk_usage(self._folder).free / 1e9
            got = f"no room for the activations of {self.batches()} batches ({free:.1f} GB free: {error})"
            do = "free some, write the model to another disk, or take fewer --samples"
            raise InputError(got, "room for what each layer reads, for every sample, twice", do) from error
        return path
