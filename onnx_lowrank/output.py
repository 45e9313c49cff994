"""Where results are written: never over an input, and whole or not at all, whatever interrupts."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Generator
from pathlib import Path

from onnx_lowrank.errors import InputError
from onnx_lowrank.graph import io


def check_paths(out: Path, *inputs: Path | str | None) -> None:
    """Refuse an output that would destroy an input or cannot be written.

    Raises:
        InputError: with what is wrong.
    """
    parent = out.absolute().parent
    for read in (Path(path) for path in inputs if path is not None):
        if read.is_dir() and out.exists() and out.resolve().is_relative_to(read.resolve()):
            raise InputError(f"{out} to write to, one of the samples in {read}", "a new file", "choose another one")
        if out.resolve() == read.resolve() or (out.exists() and read.exists() and read.samefile(out)):
            raise InputError(f"{out} to write to, the same file as {read}", "a file of its own", "choose another one")
    if out.is_dir():
        raise InputError(f"the folder {out} as output", "a file name", f"write to {out / 'model.onnx'}")
    if not parent.is_dir():
        raise InputError(f"output in {parent}, which is no folder", "an existing folder", "make it first")
    if not os.access(parent, os.W_OK):
        raise InputError(f"output in {parent}, which is not writable", "a writable folder", "choose another one")


@contextlib.contextmanager
def staging(out: Path) -> Generator[Path]:
    """A folder beside `out` for everything that is not finished yet; it is gone afterwards, whatever happens.

    Raises:
        InputError: if it cannot be made.
    """
    folder: Path | None = None
    try:
        with _undisturbed():  # a folder that nobody knows of yet would stay
            folder = _folder_beside(out)
        yield folder
    finally:
        with _undisturbed():
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)


def _folder_beside(out: Path) -> Path:
    parent = out.absolute().parent
    try:
        return Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=parent))
    except OSError as error:
        raise InputError(f"{parent} ({error.strerror})", "a writable folder", "choose another") from error


def publish(finished: Path, out: Path) -> None:
    """Move a finished file, its external data first, to where the user wants it: both or neither if interrupted."""
    data = io.data_of(finished)
    with _undisturbed():
        if data.exists():
            data.replace(out.with_name(data.name))
        finished.replace(out)


@contextlib.contextmanager
def _undisturbed() -> Generator[None]:
    """SIGINT and SIGTERM that arrive in the block are heeded after it."""
    if threading.current_thread() is not threading.main_thread():  # signals only ever arrive there
        yield
        return
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in handlers:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set from Python
        for number in came[:1]:
            signal.raise_signal(number)
