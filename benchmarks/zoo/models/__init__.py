"""One file per model family. Every `ZooModel` a module defines at top level is part of the zoo."""

import importlib
import pkgutil
from functools import cache

from benchmarks.zoo.model import ZooModel


@cache
def all_models() -> dict[str, ZooModel]:
    """Every model of the zoo by name, sorted.

    Raises:
        ImportError: A package of the extra `zoo` is missing.
    """
    found: dict[str, ZooModel] = {}
    for entry in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{entry.name}")
        found |= {value.name: value for value in vars(module).values() if isinstance(value, ZooModel)}
    return dict(sorted(found.items()))
