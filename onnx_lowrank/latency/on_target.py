"""Time what `onnx-lowrank latency request` asks for on this machine, and write a latency table.

Needs python 3.9, numpy and onnxruntime. Put it beside the request and run `python measure.py`; then, where the request
was made, `onnx-lowrank plan MODEL -o plan.json --table table.json`, or `onnx-lowrank latency import table.json`.

If it dies, run it again: it goes on where it was, without the chain that it died of.

Layers and their chains are run in turns; a price is the median over the rounds of (chain / layer), times the layer's
own latency. On one CPU thread time is that thread's own, otherwise the wall clock's.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import signal
import sys
import tempfile
import zipfile
from collections.abc import Generator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from onnx_lowrank.latency.blocks import PROBE_ROUNDS, smallest_block
from onnx_lowrank.latency.on_target_journal import DiedError, Journal
from onnx_lowrank.latency.on_target_sessions import LEVELS, RefusedError, RequestError, Target, Weighted, one_line
from onnx_lowrank.latency.turns import relative_to_first, sample

MADE_BY = ""  # filled in where the script is put together
_SCHEMA = 1
_MODEL_ROUNDS = 15
_OPEN_BYTES = 256 << 20  # weights of sessions held open at once


class Measurement:
    """One request, answered.

    Args:
        request: The opened request.
        manifest: What it holds.
        target: Where to run.
        out: Receives the table.
    """

    def __init__(self, request: zipfile.ZipFile, manifest: Mapping[str, Any], target: Target, out: Path) -> None:
        self._request, self._manifest, self._target, self._out = request, manifest, target, out
        self._records: dict[str, list[dict[str, Any]]] = {level: [] for level in LEVELS}
        self.blocks: dict[str, int] = {}
        self._journal = Journal(out, [manifest, self._circumstances("all")])
        for section in self._journal.tables:
            level = section["circumstances"]["level"]
            if section["circumstances"] == self._circumstances(level):
                self._records[level] = section["records"]
                self.blocks.update(section["channel_blocks"])

    def run(self) -> None:
        """Time everything; the table is written anew after every layer, so that little is lost if it ends early."""
        for kind, files in self._manifest["probes"].items():
            if kind not in self.blocks:
                self.blocks[kind] = self._block(files)
            _say(f"channel block of {kind}: {self.blocks[kind]}")
        levels = self._models()
        self._write()
        groups = self._manifest["layers"]
        for number, group in enumerate(groups, 1):
            for level in sorted({levels[variant] for variant in group["variants"]}):
                if self._record(level, group) is None:  # it is written together with its chains
                    self._layer(group, level)
            self._write()
            _say(f"{number} of {len(groups)} layers: {group['what']}")
        self._journal.finish()

    def _circumstances(self, level: str) -> dict[str, Any]:
        return self._target.circumstances(level, self._manifest["lowered_by"])

    def _record(self, level: str, entry: Mapping[str, Any]) -> dict[str, Any] | None:
        return next((record for record in self._records[level] if record["key"] == entry["key"]), None)

    @contextlib.contextmanager
    def _needed(self, what: str, level: str) -> Generator[None]:
        """Something is opened without which there is nothing to measure."""
        try:
            with self._journal.opening(f"{level} {what}"):
                yield
        except RefusedError as error:
            got = f"{what} at level {level}, which {self._target.provider} does not run ({error})"
            again = f", or delete {self._journal.path} to have it tried again" if isinstance(error, DiedError) else ""
            raise RequestError(
                got, "a provider that runs it", f"ask for another one, or give other options{again}"
            ) from error

    def _block(self, files: Mapping[str, str]) -> int:
        runs = []
        for name in files.values():
            with self._needed(name, "all"):
                runs.append(self._target.bind_chain(self._request.read(name), "all"))
        ratios = relative_to_first(sample(runs, self._target.clock, PROBE_ROUNDS))
        return smallest_block(dict(zip(map(int, files), ratios.tolist())))

    def _models(self) -> list[str]:
        """Time whole models, unless all were timed; returns the best level of every variant of the normalized one."""
        models = self._manifest["models"]
        if any(self._record(level, entry) is None for entry in models for level in LEVELS):
            self._time_models(models)
        times = {(level, r["key"]): r["ms"] for level in LEVELS for r in self._records[level] if r["kind"] == "model"}
        variants = [entry["key"] for entry in models if entry["variant"]]
        return [min((times[level, key], level) for level in LEVELS)[1] for key in variants]

    def _time_models(self, models: Sequence[Mapping[str, Any]]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self._request.extractall(folder, [n for n in self._request.namelist() if n.startswith("models/")])
            feeds = [(dict(self._feeds(entry["file"])), entry["weight"]) for entry in self._manifest["inputs"]]
            runs, who = [], []
            for entry, level in ((entry, level) for entry in models for level in LEVELS):
                with self._needed(entry["what"], level):
                    runs.append(self._model(Path(folder, entry["file"]), level, entry["shapes"], feeds))
                who.append((entry, level))
            samples = sample(runs, self._target.clock, _MODEL_ROUNDS)
            runs.clear()  # what is open cannot be deleted everywhere
        times = (relative_to_first(samples) * float(np.median(samples[:, 0])) * 1e3).tolist()
        for (entry, level), ms in zip(who, times):
            self._put(level, entry, ms, len(samples), kind="model")
            _say(f"{entry['what']}: {ms:.3f} ms at level {level}")

    def _model(self, path: Path, level: str, shapes: Sequence[Sequence[str]], feeds: Sequence[Any]) -> Weighted:
        session = self._target.open(str(path), level, shapes)
        return Weighted([(self._target.bind(session, given), weight) for given, weight in feeds])

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
                model = self._request.read(entry["file"])
                with self._journal.opening(f"{level} {entry['key']}"):
                    opened.append(self._target.bind_chain(model, level, entry["shapes"]))
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

    def _write(self) -> None:
        tables = [
            {
                "circumstances": self._circumstances(level),
                "channel_blocks": self.blocks,
                "records": records,
            }
            for level, records in self._records.items()
            if records
        ]
        part = self._out.with_name(self._out.name + ".part")
        part.write_text(json.dumps({"schema": _SCHEMA, "tables": tables}, indent=1) + "\n", encoding="utf-8")
        part.replace(self._out)
        self._journal.started()


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def _stop(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def _measure(asked: argparse.Namespace) -> None:
    with zipfile.ZipFile(asked.request) as request:
        manifest = json.loads(request.read("manifest.json"))
        made_by = manifest["lowered_by"]
        if made_by != MADE_BY:  # the script was left on the device by another request
            got, expected = f"{asked.request} of onnx-lowrank {made_by}", f"one of {MADE_BY}, as this script is"
            raise RequestError(got, expected, "unpack measure.py of that request")
        Measurement(request, manifest, Target(asked, manifest), asked.output).run()


def main() -> int:
    """Read the command line, measure, write."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--request", type=Path, default=here / "request.zip", help="the request; request.zip beside")
    parser.add_argument("-o", "--output", type=Path, default=Path("table.json"), help="receives the table")
    parser.add_argument("--provider-option", action="append", default=[], help="name=value, passed to the provider")
    parser.add_argument("--threads", type=int, help="threads, 0 for all cores; by default as the request says")
    parser.add_argument("--allow-fallback", action="store_true", help="let nodes run on the CPU instead")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, _stop)  # in order, so that no model is blamed for it
    try:
        _measure(asked)
    except RequestError as error:
        _say(f"error: {error}")
        return 2
    except (OSError, zipfile.BadZipFile, KeyError, ValueError) as error:
        got = f"{asked.request} for {asked.output} ({type(error).__name__}: {one_line(error)})"
        wanted = "a file of `onnx-lowrank latency request`, and room for its table"
        _say(f"error: {RequestError(got, wanted, 'check both paths')}")
        return 2
    _say(f"written to {asked.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
