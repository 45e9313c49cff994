"""A plan: which layer becomes which chain. Numbers only, JSON round trip, editable by hand."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from onnx_lowrank.decomposition import Rank
from onnx_lowrank.errors import InputError

KEEP = "keep"
MEASURED, ESTIMATED = "measured", "estimated"
DATA_FREE, CALIBRATED, REFIT = "data-free", "calibrated", "refit"
# Bytes that moments of one layer, and decomposed weights, may take where nobody says otherwise.
MEMORY_LIMIT = 1 << 29


@dataclass(frozen=True)
class Choice:
    """The decision for one layer.

    Args:
        key: `Layer.key`.
        node: Name of the layer's (first) node, for the reader.
        method: Name of a decomposition, or "keep".
        rank: Empty for "keep".
        predicted_error: Relative Frobenius error of the weight; 0 for "keep".
        predicted_ms: Milliseconds per run, with what `micro_model` puts behind the chain; None where nothing is known.
        source: Whether `predicted_ms` was "measured" or "estimated"; None without it, and in plans of earlier versions.
    """

    key: str
    node: str
    method: str
    rank: Rank = ()
    predicted_error: float = 0.0
    predicted_ms: float | None = None
    source: str | None = None

    @property
    def keeps(self) -> bool:
        """Whether the layer stays as it is."""
        return self.method == KEEP


@dataclass(frozen=True)
class PassSpec:
    """A pass and its options, as in `name{option=value}`."""

    name: str
    options: dict[str, Any] = field(default_factory=dict[str, Any])

    def __str__(self) -> str:
        inner = ",".join(f"{key}={value}" for key, value in self.options.items())
        return self.name + (f"{{{inner}}}" if inner else "")


@dataclass(frozen=True)
class Plan:
    """What `apply` needs to write the same model again.

    Args:
        model_sha256: Hash of the model file (and its external data) the plan was made for.
        data_sha256: Hash of the data given, or None.
        versions: Library versions the plan was made with.
        passes: Graph passes in order, with options.
        layers: One choice per layer.
        fit: How the arrays come about: "data-free", from the weights alone; "calibrated", for the inputs the samples
            give; "refit", fitted to the original's outputs on them.
        planned_for: The device it was planned for and how its latencies are known, in words; empty for the machine that
            made the plan.
        memory_limit: Bytes that moments of one layer may take; those of larger ones say less, and are fitted otherwise.
    """

    model_sha256: str
    layers: tuple[Choice, ...]
    passes: tuple[PassSpec, ...] = ()
    data_sha256: str | None = None
    versions: dict[str, str] = field(default_factory=dict[str, str])
    fit: str = DATA_FREE
    schema: int = 1
    planned_for: str = ""
    memory_limit: int = MEMORY_LIMIT

    def to_json(self) -> str:
        """The plan as JSON, the same text for the same plan."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @property
    def changes_nothing(self) -> bool:
        """Whether it describes the original itself: no pass, and every layer kept."""
        return not self.passes and all(choice.keeps for choice in self.layers)

    @property
    def digest(self) -> str:
        """Short hash of everything that determines the rewritten model; stamped into its nodes."""
        decisive = [(c.key, c.method, list(c.rank)) for c in self.layers]
        passes = [(p.name, sorted(p.options.items())) for p in self.passes]
        data = None if self.fit == DATA_FREE else [self.data_sha256, self.memory_limit]
        text = json.dumps([self.model_sha256, decisive, passes, self.fit, data], default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def choice(self, key: str) -> Choice | None:
        """The choice for layer `key`, or None."""
        return next((choice for choice in self.layers if choice.key == key), None)

    @staticmethod
    def from_json(text: str, source: str = "plan") -> Plan:
        """Read a plan.

        Raises:
            InputError: if `text` is not a plan of this schema; names the field at fault.
        """
        try:
            raw = json.loads(text)
            if raw["schema"] != 1:
                raise InputError(f"schema {raw['schema']!r} in {source}", "schema 1", "make the plan again")
            layers = tuple(_choice(item) for item in raw["layers"])
            twice = [key for key, count in Counter(choice.key for choice in layers).items() if count > 1]
            if twice:
                raise InputError(f"layer {twice[0]!r} twice in {source}", "one choice per layer", "remove one")
            passes = tuple(PassSpec(str(p["name"]), dict(p["options"])) for p in raw["passes"])
            data = raw["data_sha256"]
            versions = {str(key): str(value) for key, value in raw["versions"].items()}
            fit = _fit(str(raw.get("fit", DATA_FREE)))
            known = None if data is None else str(data)
            planned_for = str(raw.get("planned_for", ""))
            limit = _limit(int(raw.get("memory_limit", MEMORY_LIMIT)))
            return Plan(
                str(raw["model_sha256"]),
                layers,
                passes,
                known,
                versions,
                fit,
                planned_for=planned_for,
                memory_limit=limit,
            )
        except json.JSONDecodeError as error:
            raise InputError(f"{source} that is not JSON ({error})", "a plan file", "make it with `plan`") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            detail = f"{type(error).__name__}: {error}"
            raise InputError(
                f"{source} with a bad field ({detail})", "a plan file", "compare with a fresh one"
            ) from error

    @staticmethod
    def read(path: Path) -> Plan:
        """Read a plan file."""
        try:
            return Plan.from_json(path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} ({error})", "a readable plan file", "check the path") from error


def _fit(name: str) -> str:
    if name not in {DATA_FREE, CALIBRATED, REFIT}:
        raise ValueError(f"fit {name!r}")
    return name


def _limit(size: int) -> int:
    if size <= 0:
        raise ValueError(f"memory_limit {size}")
    return size


def _choice(item: dict[str, Any]) -> Choice:
    rank = tuple(item["rank"])
    if not all(isinstance(r, int) and not isinstance(r, bool) and r > 0 for r in rank):
        raise ValueError(f"rank {list(rank)} of layer {item['key']}")
    ms, source = item.get("predicted_ms"), item.get("source")
    if source not in {None, MEASURED, ESTIMATED}:
        raise ValueError(f"source {source!r} of layer {item['key']}")
    return Choice(
        key=str(item["key"]),
        node=str(item["node"]),
        method=str(item["method"]),
        rank=rank,
        predicted_error=float(item.get("predicted_error", 0.0)),
        predicted_ms=None if ms is None else float(ms),
        source=source,
    )
