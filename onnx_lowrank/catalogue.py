"""Every graph pass and decomposition there is: found by walking `onnx_lowrank.passes`, built from their options' text.

A class is listed when it is a frozen dataclass with a name, defined in a module of that package, and every field has a
default. Third parties name a module, or one class, in the entry-point group `onnx_lowrank.passes`; what is wrong with
it ends the command.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from inspect import ismodule
from types import ModuleType, NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import onnx_lowrank.passes
from onnx_lowrank.decomposition import Decomposition
from onnx_lowrank.errors import InputError
from onnx_lowrank.plan import PassSpec
from onnx_lowrank.third_party import ThirdParty, failure
from onnx_lowrank.transform import Pass

GROUP = "onnx_lowrank.passes"
Rewrite = type[Pass] | type[Decomposition]


@dataclass(frozen=True)
class Option:
    """An option of a pass: a field of its dataclass. `kind` is its type in words, `default` as one would write it."""

    name: str
    kind: str
    default: str


@dataclass(frozen=True)
class Entry:
    """A line of `onnx-lowrank passes`.

    Args:
        kind: "graph pass" or "decomposition".
        name: What `--passes` calls it.
        options: Its options.
        description: One sentence.
        on_request: Why a decomposition is tried only where it is named; empty: by default.
    """

    kind: str
    name: str
    options: tuple[Option, ...]
    description: str
    on_request: str = ""


def catalogue() -> list[Entry]:
    """Every graph pass and decomposition, by kind and name."""
    entries = [
        Entry(
            "graph pass" if issubclass(found, Pass) else "decomposition",
            name,
            tuple(Option(item.name, _words(_hint(found, item)), _text(_default(item))) for item in options_of(found)),
            (inspect.getdoc(found) or "").partition("\n")[0],
            found.on_request if issubclass(found, Decomposition) else "",
        )
        for name, found in discover().items()
    ]
    return sorted(entries, key=lambda entry: (entry.kind != "graph pass", entry.name))


@cache
def discover() -> dict[str, Rewrite]:
    """Name -> class, of all passes and decompositions that options can build.

    Raises:
        InputError: if two have the same name, or an entry point cannot be loaded.
    """
    found: dict[str, Rewrite] = {}
    for item in (*_own(), *_third_party()):
        other = found.setdefault(item.name, item)
        if other is not item:
            got = f"two passes called {item.name!r}, in {other.__module__} and {item.__module__}"
            raise InputError(got, "different names", "remove one of the packages")
    return found


def build(spec: PassSpec) -> Pass | Decomposition:
    """The pass or decomposition `spec` asks for; what a third party decomposes by is checked (`third_party`).

    Raises:
        InputError: for an unknown name or option, or a value that the option does not take.
        PassError: if a third party's code fails.
    """
    known = discover()
    found = known.get(spec.name)
    if found is None:
        near = get_close_matches(spec.name, known, n=1)
        do = f"did you mean {near[0]!r}?" if near else "list them with `onnx-lowrank passes`"
        raise InputError(f"the pass {spec.name!r}", f"one of {', '.join(sorted(known))}", do)
    options = {item.name: item for item in options_of(found)}
    values: dict[str, Any] = {}
    for name, value in spec.options.items():
        if name not in options:
            expected = f"one of {', '.join(options)}" if options else "no option"
            raise InputError(f"the option {name!r} of pass {spec.name!r}", expected, "correct the option")
        hint = _hint(found, options[name])
        try:
            values[name] = _convert(str(value), hint)
        except ValueError as error:
            got = f"{name}={value} for pass {spec.name!r}"
            raise InputError(got, _words(hint), "give another value") from error
    try:
        made = found(**values)
    except ValueError as error:
        got = ", ".join(f"{name}={value}" for name, value in spec.options.items()) or "its defaults"
        raise InputError(f"{got} for pass {spec.name!r} ({error})", "options it takes", "give other values") from error
    except Exception as error:
        raise failure(spec.name, error, found.__module__) from error
    own = found.__module__.partition(".")[0] == __name__.partition(".")[0]
    return made if own or isinstance(made, Pass) else ThirdParty(made)


def options_of(rewrite: Rewrite) -> tuple[Field[Any], ...]:
    """Options of a pass or decomposition: the fields of its dataclass."""
    return fields(rewrite)  # pyright: ignore[reportArgumentType] - only dataclasses are listed


def split(specs: Iterable[PassSpec]) -> tuple[list[Pass], list[Decomposition]]:
    """Graph passes, in order, and the decompositions that are allowed."""
    built = [build(spec) for spec in specs]
    passes = [item for item in built if isinstance(item, Pass)]
    return passes, [item for item in built if isinstance(item, Decomposition)]


def all_decompositions() -> dict[str, Decomposition]:
    """Every decomposition there is, third-party ones included, with its default options, by name."""
    built = [build(PassSpec(name)) for name in sorted(discover())]
    return {method.name: method for method in built if isinstance(method, Decomposition)}


def default_decompositions() -> dict[str, Decomposition]:
    """Those that are tried where the user names none."""
    return {name: method for name, method in all_decompositions().items() if not method.on_request}


def _own() -> Iterator[Rewrite]:
    for module in pkgutil.walk_packages(onnx_lowrank.passes.__path__, f"{onnx_lowrank.passes.__name__}."):
        yield from _defined_in(importlib.import_module(module.name))


def _third_party() -> Iterator[Rewrite]:
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        try:
            loaded = point.load()
        except Exception as error:  # a third party's module may fail in any way; the user must learn whose it is
            raise _broken(point, f"which fails with {type(error).__name__}: {error}") from error
        wanted = [item for item in vars(loaded).values() if _named(item, loaded)] if ismodule(loaded) else [loaded]
        if not wanted:
            raise _broken(point, "in which no pass or decomposition has a name")
        for item in wanted:
            if (fault := _fault(item)) is not None:
                raise _broken(point, f"whose {getattr(item, '__name__', item)} {fault}")
            yield item


def _broken(point: EntryPoint, fault: str) -> InputError:
    got = f"the entry point {point.name!r} ({point.value}), {fault}"
    return InputError(got, "frozen dataclasses that are passes or decompositions", "mend or remove that package")


def _defined_in(module: ModuleType) -> Iterator[Rewrite]:
    yield from (item for item in vars(module).values() if _named(item, module) and _fault(item) is None)


def _named(item: object, module: ModuleType) -> bool:
    """Whether an object is a pass or decomposition of that module with a name: abstract bases have none."""
    is_pass = inspect.isclass(item) and issubclass(item, (Pass, Decomposition))
    return is_pass and item.__module__ == module.__name__ and hasattr(item, "name")


def _fault(item: object) -> str | None:
    """Why an object cannot be listed, or None."""
    if not (inspect.isclass(item) and issubclass(item, (Pass, Decomposition))):
        return "is neither a pass nor a decomposition"
    if missing := sorted(getattr(item, "__abstractmethods__", ())):
        return f"lacks {', '.join(missing)}"
    if not is_dataclass(item) or item.__setattr__ is object.__setattr__:
        return "is no frozen dataclass"
    if not isinstance(getattr(item, "name", None), str):
        return "has no name"
    try:
        get_type_hints(item)
    except (NameError, TypeError, SyntaxError) as error:
        return f"has an option whose type cannot be read ({error})"
    demanding = [field.name for field in fields(item) if _default(field) is MISSING]
    return f"has no default for {', '.join(demanding)}" if demanding else None


def _default(item: Field[Any]) -> object:
    return item.default if item.default_factory is MISSING else item.default_factory()


def _hint(owner: Rewrite, item: Field[Any]) -> object:
    return get_type_hints(owner)[item.name]


def _convert(text: str, hint: object) -> object:
    """`text` as a value of type `hint`; ValueError if it is none."""
    if get_origin(hint) is Literal:
        values = {str(value): value for value in get_args(hint)}
        return values[text] if text in values else _fail(text)
    if NoneType in get_args(hint):
        kinds = [kind for kind in get_args(hint) if kind is not NoneType]
        return None if text.lower() == "none" else _convert(text, kinds[0])
    if hint is bool:
        return {"true": True, "false": False}.get(text.lower()) if text.lower() in {"true", "false"} else _fail(text)
    if hint is int:
        return int(text)
    if hint is float:
        return float(text)
    return text if hint is str else _fail(text)


def _fail(text: str) -> object:
    raise ValueError(text)


def _words(hint: object) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if NoneType in get_args(hint):
        return " or ".join("none" if kind is NoneType else _words(kind) for kind in get_args(hint))
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return names.get(hint, str(hint)) if isinstance(hint, type) else str(hint)


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
