"""What is known of a measurement that ended early, in a file beside its table: part of measure.py, see `on_target`.

A provider may take the whole process with it. So what is opened is written down first: who finds it written down at the
next start knows what the process died of, and that the table is unfinished. Errors and Ctrl-C cross it out again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

from onnx_lowrank.latency.on_target_sessions import RefusedError


class DiedError(RefusedError):
    """A model that an earlier start died of."""

    def __init__(self) -> None:
        super().__init__("the process died of it")


class Journal:
    """Beside one table.

    Args:
        out: The table.
        same: What two starts must agree in to be the same measurement.

    Attributes:
        path: Of the journal.
        tables: Sections of the table, as far as an earlier start of this measurement came.
    """

    def __init__(self, out: Path, same: object) -> None:
        self.path = out.with_name(out.name + ".unfinished")
        self._of = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()
        told = _read(self.path)
        if told.get("of") != self._of:
            told = {}
        self._died = [*told.get("died", []), *filter(None, [told.get("opening")])]
        self._started = bool(told.get("started"))
        self.tables: list[Any] = _read(out).get("tables", []) if self._started else []
        self._write(None)

    @contextlib.contextmanager
    def opening(self, what: str) -> Generator[None]:
        """Something is opened, and run once, in the block.

        Raises:
            DiedError: if an earlier start died of it.
        """
        if what in self._died:
            raise DiedError
        self._write(what)
        try:
            yield
        finally:
            self._write(None)

    def started(self) -> None:
        """From now on the table holds what was measured here; before, it may be another measurement's."""
        if not self._started:
            self._started = True
            self._write(None)

    def finish(self) -> None:
        """The table is complete."""
        self.path.unlink(missing_ok=True)

    def _write(self, opening: str | None) -> None:
        told = {"of": self._of, "started": self._started, "died": self._died, "opening": opening}
        if opening or self._started or self._died:
            self.path.write_text(json.dumps(told), encoding="utf-8")
        else:  # nothing to remember: a table that is complete is not to look unfinished
            self.path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    """A file of ours; nothing where there is none, or it was cut off."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}
