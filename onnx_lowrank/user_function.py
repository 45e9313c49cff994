"""Functions of the user's own, named `module:function` and imported as from the current folder."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path

from onnx_lowrank.errors import InputError

FORM = "module:function"
_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def is_function_name(text: str) -> bool:
    """Whether `text` has the form `module:function`."""
    return _NAME.fullmatch(text) is not None


def user_function(name: str) -> Callable[..., object]:
    """Import the function `name`; installed modules win over those of the current folder.

    Raises:
        InputError: if the module cannot be imported or holds no such function.
    """
    module_name, _, attribute = name.partition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)  # and it stays: the function may import more when it is called
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # it runs code of the user's, which may raise anything
        right = "a module that can be imported from the current folder"
        raise InputError(f"{name}, whose import failed ({described(error)})", right, "mend it") from error
    if not hasattr(module, attribute):
        raise InputError(f"{name}, which module {module_name!r} lacks", "a function of it", "correct the name")
    function = getattr(module, attribute)
    if not callable(function):
        raise InputError(f"{name} of type {type(function).__name__}", "a function", "name another one")
    return function


def described(error: BaseException) -> str:
    """An exception of the user's code in words."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
