"""The candidate table from calibration: output errors from moments, losses from probes, in one walk of the network."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from onnx_lowrank.calibration.input_moments import InputMoments
from onnx_lowrank.calibration.moments import output_energy
from onnx_lowrank.calibration.samples import Samples
from onnx_lowrank.calibration.stops import Stop, stops
from onnx_lowrank.calibration.unfold import Fed
from onnx_lowrank.calibration.walk import INPUTS, Front, Route, route
from onnx_lowrank.candidates import Candidate
from onnx_lowrank.chain import Fit
from onnx_lowrank.decomposition import Decomposition, Rank
from onnx_lowrank.graph.model import Graph
from onnx_lowrank.latency.table import LatencyTable
from onnx_lowrank.layer import Array, Layer
from onnx_lowrank.progress import Phases
from onnx_lowrank.rewrite import Replacement, splice
from onnx_lowrank.row_space import SeenInputs
from onnx_lowrank.search.factorizations import FactorizationCache
from onnx_lowrank.search.table import GridOf, Row, most_workers, one_blas_thread, row_of
from onnx_lowrank.sensitivity import PROBES, LossCurve, Outputs, output_loss, probe_at
from onnx_lowrank.target import Target

logger = logging.getLogger(__name__)
# To be raised when a probed loss comes to mean something else: it is remembered from run to run.
PROBE_VERSION = 6
# Samples losses are probed on: as many as this many multiply-accumulates pay for, between these two.
PROBE_MACS = 4e12
PROBE_SAMPLES = (8, 256)
LARGE = 2048  # inputs from which on methods take turns: each holds several matrices of that size


@dataclass(frozen=True, eq=False)
class Calibration:
    """What the candidates are judged by.

    Args:
        samples: To take moments from, and to probe with.
        target: Where networks run.
        folder: For activations, while they are needed.
        memory: Remembers probed losses from run to run.
        identity: Everything a probed loss depends on beside the arrays that stand in for weights.
    """

    samples: Samples
    target: Target
    folder: Path
    memory: LatencyTable
    identity: str


@dataclass(eq=False)
class CalibratedTable:
    """The table in the making.

    Args:
        graph: The normalized model; it is as before after every probe.
        layers: The layers.
        methods: Allowed decompositions by name.
        grid_of: The ranks worth a look of every layer.
        cache: Receives the factorizations.
        calibration: Samples and conditions.
        phases: Timed and shown.
        spectral: As for `tabulate`.

    Attributes:
        means: Mean unfolded input of every layer that was calibrated, (groups, n), by layer key.
        positions: How many rows (output pixels, tokens) the moments of each of them are from.
        energies: ||W||^2 in the metric of the candidates' errors, tr(M G M^T), of the same layers.
        stops: The same layers by node key.
    """

    graph: Graph
    layers: Sequence[Layer]
    methods: Mapping[str, Decomposition]
    grid_of: GridOf
    cache: FactorizationCache
    calibration: Calibration
    phases: Phases
    spectral: bool = False
    means: dict[str, Array] = field(default_factory=dict[str, Array], init=False)
    positions: dict[str, int] = field(default_factory=dict[str, int], init=False)
    energies: dict[str, float] = field(default_factory=dict[str, float], init=False)
    stops: dict[str, Stop] = field(default_factory=dict[str, Stop], init=False)
    _whole: Probes | None = field(default=None, init=False)

    def rows(self) -> list[Row]:
        """Walk through the network and make every layer's row."""
        self.stops = stops(self.graph, self.layers, self.calibration.samples.memory_limit)
        path = route(self.graph, {key: stop.operand for key, stop in self.stops.items()})
        made: dict[str, Row] = {}
        with tempfile.TemporaryDirectory(prefix="calibrate-", dir=self.calibration.folder) as room:
            probes = self._probes(path, Path(room))
            inputs = InputMoments(self.stops, path, len(self.calibration.samples.fit))
            for number, cut in enumerate(path.cuts):
                layer = self.stops[cut.key].layer
                with self.phases.phase("moments"):
                    probes.front.advance(self.graph, path.fronts[number])
                    moments = inputs.at(number, probes.front, probes.fitting)
                with self.phases.phase("decompose") as advance:
                    advance(number, len(path.cuts))
                    gram = moments.shrunk(centred=self.stops[cut.key].centred)
                    seen = inputs.seen(number, probes.front, probes.fitting)
                    made[layer.key] = self._row(layer, gram, seen)
                    space = self.stops[cut.key].space
                    self.energies[layer.key] = output_energy(layer.read() if space is None else space.weight, gram)
                self.means[layer.key], self.positions[layer.key] = moments.mean, moments.count
                with self.phases.phase("sensitivity"):
                    made[layer.key] = self._probed(made[layer.key], probes, number)
            made.update(self._others(made, path, Path(room)))
        return [made[layer.key] for layer in self.layers]

    def arrays(self, layer: Layer, name: str, rank: Rank) -> Fit:
        """A candidate's arrays, with the lost mean given back."""
        method = self.methods[name]
        factors = self.cache.make(layer, method).factors(rank)
        stop = self.stops.get(layer.nodes[0])
        if layer.key not in self.means or stop is None or (stop.in_row_space and not method.whole_rows):
            return Fit(tuple(factors))
        return stop.corrected(method.chain(layer.shape, rank), factors, self.means[layer.key])

    def measure(self, chosen: Sequence[Candidate]) -> float:
        """Loss of the network's outputs under a whole choice, without refit, remembered or measured."""
        changed = [candidate for candidate in chosen if candidate.chain is not None]
        named = [(candidate.key, candidate.method, candidate.rank) for candidate in changed]
        return self._remembered(self._from_inputs(), INPUTS, ["choice", named], changed)

    @property
    def probed_on(self) -> int:
        """Samples that losses are measured on."""
        return sum(self._from_inputs().probing.values())

    def _from_inputs(self) -> Probes:
        """Probes in front of the whole network, made once."""
        if self._whole is None:
            path = route(self.graph, {key: stop.operand for key, stop in self.stops.items()})
            self._whole = self._probes(path, Path(tempfile.mkdtemp(prefix="choices-", dir=self.calibration.folder)))
        return self._whole

    def _row(self, layer: Layer, gram: Array | None = None, seen: SeenInputs | None = None) -> Row:
        methods, grid = tuple(self.methods.values()), self.grid_of(layer)
        workers = most_workers() if gram is None or gram.shape[1] < LARGE else 1
        with one_blas_thread():
            return row_of(
                layer, methods, grid, self.cache, spectral=self.spectral, gram=gram, seen=seen, workers=workers
            )

    def _probes(self, path: Route, room: Path) -> Probes:
        """The start of the walk, and the original's outputs on the samples that are probed with."""
        folder = room / f"front{len(list(room.iterdir()))}"
        folder.mkdir()
        front = Front(folder, self.calibration.target)
        fitting: dict[int, Fed] = {}
        probing: dict[int, int] = {}
        per_sample = sum(layer.macs for layer in self.layers) * len(self.layers) * PROBES / 2
        most = min(max(PROBE_MACS / max(per_sample, 1), PROBE_SAMPLES[0]), PROBE_SAMPLES[1])
        for batch, (feeds, fits, count) in enumerate(self.calibration.samples.batches()):
            front.put(feeds)
            if fits:
                fitting[batch] = Fed(count, self.calibration.samples.counted(feeds))
            elif sum(probing.values()) < most:
                probing[batch] = count
        session = front.open(self.graph, list(path.outputs))
        reference = [outputs for _, outputs in front.run(session, probing)]
        return Probes(self.graph, front, path, fitting, probing, reference)

    def _others(self, made: Mapping[str, Row], path: Route, room: Path) -> dict[str, Row]:
        """Rows of layers the walk does not stop at: data-free, but probed, from the network's inputs."""
        rest = [layer for layer in self.layers if layer.key not in made]
        if not rest:
            return {}
        probes = self._probes(path, room)
        rows: dict[str, Row] = {}
        for layer in rest:
            with self.phases.phase("decompose"):
                row = self._row(layer)
            with self.phases.phase("sensitivity"):
                rows[layer.key] = self._probed(row, probes, INPUTS)
        return rows

    def _probed(self, row: Row, probes: Probes, number: int) -> Row:
        """The row with predicted losses."""
        options = row.options[1:]
        at = probe_at([option.error for option in options])
        points = [(options[i].error, self._loss(options[i], probes, number)) for i in at]
        curve = LossCurve.through(points)
        logger.info("%s: %s", row.layer.key, curve)
        losses = (replace(option, probed_loss=curve.loss(option.error)) for option in options)
        return replace(row, options=(row.keep, *losses))

    def _loss(self, option: Candidate, probes: Probes, number: int) -> float:
        """The loss of one candidate, remembered or measured."""
        return self._remembered(probes, number, list(option.name), [option])

    def _remembered(self, probes: Probes, number: int, what: list[object], changed: Sequence[Candidate]) -> float:
        where, probed = self.calibration.target.provider, sorted(probes.probing.items())
        replacements = [self._replacement(candidate) for candidate in changed]
        text = json.dumps([self.calibration.identity, where, probed, *what])
        content = hashlib.sha256(text.encode())
        for array in (array for each in replacements for array in (*each.fit.factors, each.fit.bias)):
            content.update(b"none" if array is None else np.ascontiguousarray(array).data)
        key = "loss " + content.hexdigest()
        known = self.calibration.memory.fact(key)
        if known is None:
            known = repr(probes.loss(replacements, number))
            self.calibration.memory.put_fact(key, known)
        return float(known)

    def _replacement(self, option: Candidate) -> Replacement:
        (layer,) = (layer for layer in self.layers if layer.key == option.key)
        chain = self.methods[option.method].chain(layer.shape, option.rank)
        return Replacement(layer, chain, self.arrays(layer, option.method, option.rank), {})


@dataclass(frozen=True, eq=False)
class Probes:
    """Runs the network with layers replaced, from the activations in front of them.

    Args:
        graph: The network.
        front: Activations of the original.
        path: Where the walk stops.
        fitting: Batches moments are taken from, and what is in them.
        probing: Batches losses are measured on, and the number of samples in each.
        reference: The original's outputs on them.
    """

    graph: Graph
    front: Front
    path: Route
    fitting: Mapping[int, Fed]
    probing: Mapping[int, int]
    reference: Sequence[Outputs]

    def loss(self, replacements: Sequence[Replacement], number: int) -> float:
        """What the outputs lose by `replacements`, the front being number `number`."""
        before = self.graph.snapshot()
        self.graph.restore(before)  # edit a copy: the layers hold on to the present scopes
        try:
            splice(self.graph, replacements)
            wanted = self.path.beyond(number)
            if not wanted:
                return 0.0  # nothing that is computed from here reaches an output
            session = self.front.open(self.graph, wanted)
        finally:
            self.graph.restore(before)
        reference = [{name: outputs[name] for name in wanted} for outputs in self.reference]
        candidate = (outputs for _, outputs in self.front.run(session, self.probing))
        return output_loss(zip(reference, candidate, self.probing.values(), strict=True))
