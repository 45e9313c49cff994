"""Networks rebuilt in torch around published weights, each with its `export`. Only these modules import torch."""

from importlib import import_module
from types import ModuleType


def network(name: str) -> ModuleType:
    """Import a module of this package.

    Raises:
        ImportError: torch is missing; the message says which extra brings it.
    """
    try:
        return import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{error.name} is missing, which exports this model; `pip install -e .[train,zoo]`"
        ) from error
