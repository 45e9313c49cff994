"""What a device is asked to time for a model: micro-models of every candidate chain, the model itself, and a script.

Which chains are candidates depends on the device's channel block, which only the device knows: the request holds those
of every block, and the script times those of the block it finds.
"""

from __future__ import annotations

import ast
import io as bytes_io
import json
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from onnx_lowrank.candidates import Grid
from onnx_lowrank.catalogue import default_decompositions, split
from onnx_lowrank.chain import Chain
from onnx_lowrank.graph import io
from onnx_lowrank.latency.blocks import BLOCKS, PROBED_RANKS
from onnx_lowrank.latency.circumstances import lowered_by
from onnx_lowrank.latency.grid import KINDS, probe_model
from onnx_lowrank.latency.pieces import as_timed, chain_key
from onnx_lowrank.latency.table import LatencyTable
from onnx_lowrank.latency.work import in_words
from onnx_lowrank.layer import Layer, Site
from onnx_lowrank.micro_model import chain_model
from onnx_lowrank.pass_manager import PassManager
from onnx_lowrank.passes.normalize import DEFAULT_NORMALIZE, MEASURED_NORMALIZE
from onnx_lowrank.placement import shape_computations
from onnx_lowrank.progress import Phases
from onnx_lowrank.runtime import CONFIG
from onnx_lowrank.search.elsewhere import model_key
from onnx_lowrank.search.factorizations import FactorizationCache
from onnx_lowrank.search.prepare import Prepared, pinned
from onnx_lowrank.search.pricing import decomposed, kind_of
from onnx_lowrank.search.racer import Contestant, Racer
from onnx_lowrank.search.source import Source
from onnx_lowrank.search.survey import make_samples, normalize, runs_natively, survey
from onnx_lowrank.settings import Settings
from onnx_lowrank.target import PROVIDERS, Target
from onnx_lowrank.transform import Pass

SCRIPT = "measure.py"
REQUESTABLE = ("cpu", "cuda")
"""Providers the script can time; others need more than their options."""
_PARTS = ("turns", "blocks", "gpus", "machine", "on_target_sessions", "on_target_journal", "on_target")
_README = f"""Unpack {SCRIPT} beside this file, run `python {SCRIPT}` on the device, bring table.json back.

If it dies, run it again: it goes on where it was, and leaves out the chain that the execution provider died of.
table.json.unfinished is its notebook; it is gone when table.json is complete.
"""


@dataclass
class _Request:
    """A request in the making: what is in the zip, and the manifest that says so.

    Args:
        file: Receives the models.
        racer: Says which inputs, and whether models are timed as float32.
    """

    file: zipfile.ZipFile
    racer: Racer
    models: list[dict[str, object]] = field(default_factory=list[dict[str, object]])
    layers: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    _chains: dict[tuple[str, str], dict[str, Any]] = field(
        default_factory=dict[tuple[str, str], dict[str, Any]], init=False
    )

    def add_model(self, path: Path, sha256: str, what: str, *, variant: bool) -> None:
        """A whole model, with its own weights."""
        folder = f"models/{len(self.models)}"
        with tempfile.TemporaryDirectory(dir=self.racer.folder) as room:
            copied = Path(room, "model.onnx")
            io.copy(self.racer.runnable(path), copied)
            shapes = sorted(shape_computations(onnx.load(copied, load_external_data=False)))
            for piece in sorted(Path(room).iterdir()):
                self.file.write(piece, f"{folder}/{piece.name}")
        key = model_key(sha256, self.racer.samples, as_float32=self.racer.as_float32)
        what = f"{what} {sha256[:12]}"
        file = f"{folder}/model.onnx"
        self.models.append({"key": key, "what": what, "file": file, "shapes": shapes, "variant": variant})

    def add_chain(self, layer: Layer, chain: Chain | None, site: Site, variant: int, block: int) -> None:
        """A chain at a site, or None: the layer itself; candidates of variant `variant` on machines of this block."""
        own = chain_key(layer, None, site)
        if own not in self.layers:
            self.layers[own] = self._entry(layer, None, site, kind=kind_of(layer), variants=[], chains=[])
        group = self.layers[own]
        if variant not in group["variants"]:
            group["variants"].append(variant)
        if chain is None:
            return
        key = (own, chain_key(layer, chain, site))
        if key not in self._chains:
            self._chains[key] = self._entry(layer, chain, site, bytes=4 * chain.params, blocks=[])
            group["chains"].append(self._chains[key])
        if block not in self._chains[key]["blocks"]:
            self._chains[key]["blocks"].append(block)

    @property
    def chains(self) -> int:
        """How many chains and layers there are."""
        return len(self.layers) + len(self._chains)

    def _entry(self, layer: Layer, chain: Chain | None, site: Site, **more: object) -> dict[str, Any]:
        key = chain_key(layer, chain, site)
        name = f"chains/{key}.onnx"
        kind = TensorProto.FLOAT if self.racer.as_float32 else None
        model = chain_model(layer, chain, site, elem_type=kind, seed=None)
        if name not in self.file.NameToInfo:
            self.file.writestr(name, model.SerializeToString())
        shapes = sorted(shape_computations(model))
        return {"key": key, "what": in_words(layer, chain, site), "file": name, "shapes": shapes, **more}


def write_request(source: Source, settings: Settings, out: Path, phases: Phases, *, threads: int = 1) -> int:
    """Write what a device needs to price a model; nothing is timed here.

    Args:
        source: The model, and samples where there are any.
        settings: Provider and its options (the script's defaults), shapes, passes, layers to leave alone.
        out: Receives the zip.
        phases: Timed and shown.
        threads: The script's default; 0 for all cores of the device.

    Returns:
        How many chains and layers the device is asked to time at most.

    Raises:
        LowRankError: if the model does not run on the CPU here, or a pass fails.
    """
    host = Target(shapes=settings.target.shapes)
    local = replace(settings, target=host)
    with (
        tempfile.TemporaryDirectory(prefix="onnx-lowrank-") as folder,
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file,
        LatencyTable() as memory,
    ):
        samples, notes = make_samples(source.graph, host, source.data, settings.seed)
        native, _ = runs_natively(source.path, host)
        racer = Racer(host, samples, Path(folder), as_float32=not native)
        request = _Request(file, racer)
        request.add_model(source.path, source.sha256, f"original {source.path.name}", variant=False)
        for variant, (own, ready) in enumerate(_variants(source, local, racer, notes, phases)):
            path = ready.normalized.path
            request.add_model(path, io.model_sha256(path), "normalized", variant=True)
            cache = FactorizationCache(settings.memory_limit, racer.folder)
            for block in BLOCKS:
                grid = Grid.of_machine(block)
                rows, _ = decomposed(own, ready, local, cache, phases, memory, lambda _, grid=grid: grid)
                for row in (row for row in rows if row.factorable):
                    for site in as_timed(row.layer.sites, settings.target.provider):
                        for option in row.options:
                            request.add_chain(row.layer, option.chain, site, variant, block)
        _finish(request, settings.target, threads)
    return request.chains


def _variants(
    source: Source, settings: Settings, racer: Racer, notes: Sequence[str], phases: Phases
) -> Iterator[tuple[Source, Prepared]]:
    """The normalized model, and every one with a rewrite that pays on some machines only."""
    passes, methods = split(settings.passes)
    allowed = {method.name: method for method in methods} or default_decompositions()
    optional: list[tuple[Pass, ...]] = [(), *((step,) for step in (() if passes else MEASURED_NORMALIZE))]
    for number, extra in enumerate(optional):
        graph = io.load(source.path)
        room = racer.folder / f"variant{number}"
        room.mkdir()
        path = room / "normalized.onnx"
        with phases.phase("normalize"):
            if extra and not PassManager(extra).run(graph)[0].modified:
                continue
            records = normalize(graph, passes or DEFAULT_NORMALIZE, (), racer, path)
            found = pinned(survey(graph, racer, room), settings)
        own, level = replace(source, graph=graph), settings.target.levels[0]
        contestants = (Contestant(source.path, level), Contestant(path, level))
        yield own, Prepared(found, records, allowed, racer, *contestants, tuple(notes))


def _finish(request: _Request, target: Target, threads: int) -> None:
    """Probes, inputs, script and manifest."""
    file = request.file
    inputs: list[dict[str, object]] = []
    for number, sample in enumerate(request.racer.samples):
        fed = request.racer.fed(sample)
        arrays = {name: array.astype(str) if array.dtype.kind == "O" else array for name, array in fed.items()}
        packed = bytes_io.BytesIO()
        np.savez(packed, **arrays)  # pyright: ignore[reportArgumentType] - the stub takes any keyword for allow_pickle
        file.writestr(f"inputs/{number}.npz", packed.getvalue())
        inputs.append({"file": f"inputs/{number}.npz", "weight": sample.weight})
    probes: dict[str, dict[int, str]] = {}
    for kind in KINDS:
        probes[kind] = {rank: f"probes/{kind}_{rank}.onnx" for rank in PROBED_RANKS}
        for rank, name in probes[kind].items():
            file.writestr(name, probe_model(rank, kind, target.provider).SerializeToString())
    manifest = {
        "lowered_by": lowered_by(),
        "provider": target.provider,
        "options": target.provider_options,
        "threads": threads,
        "provider_name": PROVIDERS[target.provider],
        "config": CONFIG,
        "inputs": inputs,
        "probes": probes,
        "models": request.models,
        "layers": list(request.layers.values()),
    }
    file.writestr("manifest.json", json.dumps(manifest, indent=1))
    file.writestr(SCRIPT, script())
    file.writestr("README.txt", _README)


def script() -> str:
    """measure.py: the modules that it consists of in one text, without what they import of each other."""
    folder = resources.files("onnx_lowrank.latency")
    texts = {name: (folder / f"{name}.py").read_text(encoding="utf-8") for name in _PARTS}
    docstring = ast.get_docstring(ast.parse(texts[_PARTS[-1]]), clean=False)
    parts = [f"# {name}.py of onnx-lowrank {lowered_by()}\n{_body(text).lstrip()}" for name, text in texts.items()]
    text = f'"""{docstring}"""\n\nfrom __future__ import annotations\n\n' + "\n\n".join(parts)
    return text.replace('MADE_BY = ""', f"MADE_BY = {lowered_by()!r}")


def _body(text: str) -> str:
    """A module's text without its docstring and its imports of this package and of the future."""
    lines = text.splitlines(keepends=True)
    for number, node in enumerate(ast.parse(text).body):
        own = isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("onnx_lowrank", "__future__"))
        if own or number == 0:
            lines[node.lineno - 1 : node.end_lineno] = [""] * ((node.end_lineno or node.lineno) - node.lineno + 1)
    return "".join(lines)
