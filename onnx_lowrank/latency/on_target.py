"""Time what `onnx-lowrank latency request` asks for on this machine, and write a latency table.

Needs python 3.9, numpy and onnxruntime. Put it beside the request and run `python measure.py`; then, where the request
was made, `onnx-lowrank plan MODEL -o plan.json --table table.json`, or `onnx-lowrank latency import table.json`.

Layers and their chains are run in turns; a price is the median over the rounds of (chain / layer), times the layer's
own latency. On one CPU thread time is that thread's own, otherwise the wall clock's.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from onnx_lowrank.latency.blocks import PROBE_ROUNDS, smallest_block
from onnx_lowrank.latency.on_target_sessions import LEVELS, RefusedError, Target, Weighted, one_line
from onnx_lowrank.latency.turns import relative_to_first, sample

_SCHEMA = 1
_MODEL_ROUNDS = 15
_OPEN_BYTES = 256 << 20  # weights of sessions held open at once


class Measurement:
    """One request, answered.

    Args:
        request: The opened request.
        target: Where to run.
    """

    def __init__(self, request: zipfile.ZipFile, target: Target) -> None:
        self._request, self._target = request, target
        self._manifest = json.loads(request.read("manifest.json"))
        self._records: dict[str, list[dict[str, Any]]] = {level: [] for level in LEVELS}
        self.blocks: dict[str, int] = {}

    def run(self, out: Path) -> None:
        """Time everything; the table is written anew after every layer, so that little is lost if it ends early."""
        for kind, files in self._manifest["probes"].items():
            self.blocks[kind] = self._block(files)
            _say(f"channel block of {kind}: {self.blocks[kind]}")
        levels = self._models()
        groups = self._manifest["layers"]
        for number, group in enumerate(groups, 1):
            for level in sorted({levels[variant] for variant in group["variants"]}):
                self._layer(group, level)
            self._write(out)
            _say(f"{number} of {len(groups)} layers: {group['what']}")

    def _block(self, files: Mapping[str, str]) -> int:
        runs = [self._target.bind_chain(self._request.read(name), "all") for name in files.values()]
        ratios = relative_to_first(sample(runs, self._target.clock, PROBE_ROUNDS))
        return smallest_block(dict(zip(map(int, files), ratios.tolist())))

    def _models(self) -> list[str]:
        """Time whole models; returns the best level of every variant of the normalized model."""
        with tempfile.TemporaryDirectory() as folder:
            self._request.extractall(folder, [n for n in self._request.namelist() if n.startswith("models/")])
            feeds = [(dict(self._feeds(entry["file"])), entry["weight"]) for entry in self._manifest["inputs"]]
            runs, who = [], []
            for entry in self._manifest["models"]:
                for level in LEVELS:
                    session = self._target.open(str(Path(folder, entry["file"])), level)
                    runs.append(Weighted([(self._target.bind(session, given), weight) for given, weight in feeds]))
                    who.append((entry, level))
            samples = sample(runs, self._target.clock, _MODEL_ROUNDS)
            runs.clear()  # what is open cannot be deleted everywhere
        times = (relative_to_first(samples) * float(np.median(samples[:, 0])) * 1e3).tolist()
        for (entry, level), ms in zip(who, times):
            self._put(level, entry, ms, len(samples), kind="model")
            _say(f"{entry['what']}: {ms:.3f} ms at level {level}")
        normalized = [entry["key"] for entry in self._manifest["models"] if entry["variant"]]
        best = {key: min((t, lvl) for (e, lvl), t in zip(who, times) if e["key"] == key)[1] for key in normalized}
        return [best[key] for key in normalized]

    def _feeds(self, name: str) -> Mapping[str, Any]:
        return np.load(io.BytesIO(self._request.read(name)), allow_pickle=False)

    def _layer(self, group: Mapping[str, Any], level: str) -> None:
        """The layer and the chains that the machine's channel block leaves, in turns, few enough to be open at once."""
        block = self.blocks[group["kind"]]
        batch, size, scale = [], 0, None
        for entry in [entry for entry in group["chains"] if block in entry["blocks"]]:
            if batch and size + entry["bytes"] > _OPEN_BYTES:
                scale = self._time(group, batch, level, scale)
                batch, size = [], 0
            batch.append(entry)
            size += entry["bytes"]
        self._time(group, batch, level, scale)

    def _time(self, group: Mapping[str, Any], batch: Sequence[Mapping[str, Any]], level: str, scale: Any) -> Any:
        """Time the layer and a batch of its chains; `scale` is the layer's latency from an earlier batch."""
        opened, entries = [], []
        for entry in [group, *batch]:
            try:
                opened.append(self._target.bind_chain(self._request.read(entry["file"]), level))
                entries.append(entry)
            except RefusedError as error:
                if entry is not group or scale is None:
                    self._put(level, entry, None, 0, reason=str(error))
        if not opened:
            return scale
        samples = sample(opened, self._target.clock)
        if scale is None or entries[0] is not group:
            scale = float(np.median(samples[:, 0])) * 1e3
            self._put(level, entries[0], scale, len(samples))
        for entry, ratio in list(zip(entries, relative_to_first(samples).tolist()))[1:]:
            self._put(level, entry, scale * ratio, len(samples))
        return scale

    def _put(
        self, level: str, entry: Mapping[str, Any], ms: Any, samples: int, *, kind: str = "chain", reason: str = ""
    ) -> None:
        measured = datetime.now(timezone.utc).isoformat()  # noqa: UP017 - datetime.UTC came with python 3.11
        record = {"key": entry["key"], "what": entry["what"], "ms": ms, "samples": samples, "kind": kind}
        self._records[level].append({**record, "reason": reason, "measured": measured})

    def _write(self, out: Path) -> None:
        tables = [
            {
                "circumstances": self._target.circumstances(level, self._manifest["lowered_by"]),
                "channel_blocks": self.blocks,
                "records": records,
            }
            for level, records in self._records.items()
            if records
        ]
        unfinished = out.with_name(out.name + ".part")
        unfinished.write_text(json.dumps({"schema": _SCHEMA, "tables": tables}, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(out)


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def main() -> int:
    """Read the command line, measure, write."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--request", type=Path, default=here / "request.zip", help="the request; request.zip beside")
    parser.add_argument("-o", "--output", type=Path, default=Path("table.json"), help="receives the table")
    parser.add_argument("--provider", help="execution provider, by default as the request says")
    parser.add_argument("--provider-option", action="append", default=[], help="name=value, passed to the provider")
    parser.add_argument("--threads", type=int, help="threads, 0 for all cores; by default as the request says")
    parser.add_argument("--allow-fallback", action="store_true", help="let nodes run on the CPU instead")
    asked = parser.parse_args()
    try:
        with zipfile.ZipFile(asked.request) as request:
            target = Target(asked, json.loads(request.read("manifest.json")))
            Measurement(request, target).run(asked.output)
    except (OSError, zipfile.BadZipFile, RefusedError, KeyError, ValueError) as error:
        _say(f"error: {type(error).__name__}: {one_line(error)}")
        return 2
    _say(f"written to {asked.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
