"""What onnxruntime's native code says when something fails, on one line a user can read."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Generator
from typing import IO


def native_reason(error: Exception | str) -> str:
    """The sentence of a native error, without colours, source paths, time stamps and error codes."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    if missing := re.search(r"with error: (.+)", text):
        return missing[1].strip()
    if told := re.search(r"\[ERROR\] (?:\[OpenVINO[\w-]*\] )?(.+)", text):
        return told[1].strip()
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"^\S+ \S+ \[\w:onnxruntime:[^\]]*\] ", "", text)
    text = re.sub(r"^/\S+:\d+ .*?\) (?=[A-Z])", "", text)
    return " ".join(text.split())[:300]


@contextlib.contextmanager
def captured_stderr() -> Generator[Callable[[], str]]:
    """Collect what native code writes to standard error: a provider says only there why it does not load."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as sink:
        saved = os.dup(2)
        os.dup2(sink.fileno(), 2)
        try:
            yield lambda: _text(sink)
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def _text(sink: IO[bytes]) -> str:
    sink.seek(0)
    return sink.read().decode(errors="replace")
