"""Decompositions: pure mathematics from a layer's weight to the factors of a chain.

Every frozen dataclass in this folder that subclasses `Decomposition` is found by walking the folder.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil

from onnx_lowrank.decomposition import Decomposition


def decompositions() -> dict[str, Decomposition]:
    """All decompositions of this folder with their default options, by name."""
    modules = (importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__))
    classes = (
        item
        for module in modules
        for item in vars(module).values()
        if inspect.isclass(item) and item.__module__ == module.__name__
    )
    made = [item() for item in classes if issubclass(item, Decomposition) and not inspect.isabstract(item)]
    return {method.name: method for method in sorted(made, key=lambda method: method.name)}
