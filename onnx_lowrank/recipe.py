"""What a user writes down: `a,b{option=value}` for passes, and a TOML file with the command line's options."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import get_args, get_type_hints

from onnx_lowrank.errors import InputError
from onnx_lowrank.plan import PassSpec
from onnx_lowrank.user_function import is_function_name

_FORM = "name or name{option=value,...}, separated by commas"
_SPEC = re.compile(r"\s*(?P<name>[A-Za-z_][\w.-]*)\s*(\{(?P<options>[^{}]*)\})?\s*(,|$)")


def parse_passes(text: str) -> list[PassSpec]:
    """Read `a,b{option=1,x=true}`; values stay text until the pass that knows their types is built.

    Raises:
        InputError: if `text` is not of this form.
    """
    specs: list[PassSpec] = []
    position = 0
    while position < len(text):
        match = _SPEC.match(text, position)
        if match is None:
            raise InputError(f"--passes {text!r}, unreadable at {text[position:]!r}", _FORM, "write it like that")
        specs.append(PassSpec(match["name"], dict(_options(text, match["options"] or ""))))
        position = match.end()
    if not specs or text.rstrip().endswith(","):
        raise InputError(f"--passes {text!r} with an empty name", _FORM, "write it like that")
    return specs


def _options(text: str, inner: str) -> Iterable[tuple[str, str]]:
    for item in inner.split(",") if inner.strip() else ():
        name, equals, value = (part.strip() for part in item.partition("="))
        if not (name and equals and value):
            raise InputError(
                f"--passes {text!r} with the option {item.strip()!r}", "option=value", "write it like that"
            )
        yield name.replace("-", "_"), value


@dataclass(frozen=True)
class Recipe:
    """Options of `optimize` in a file; the key of each is its name on the command line. None: not given.

    Paths are relative to the file they stand in. What is given on the command line wins.
    """

    speedup: float | None = None
    latency_ms: float | None = None
    max_error: float | None = None
    max_drop: float | None = None
    keep_macs: float | None = None
    keep_params: float | None = None
    calibration: Path | str | None = None
    preprocess: str | None = None
    samples: int | None = None
    refit: bool | None = None
    eval: Path | str | None = None
    metric: str | None = None
    error_metric: str | None = None
    provider: str | None = None
    threads: int | None = None
    shape: tuple[str, ...] | None = None
    passes: tuple[PassSpec, ...] | None = None
    allocator: str | None = None
    evaluations: int | None = None
    of: str | None = None
    only: tuple[str, ...] | None = None
    keep: tuple[str, ...] | None = None
    seed: int | None = None
    time_limit: float | None = None
    memory_limit: int | None = None
    allow_fallback: bool | None = None
    fail_if_unchanged: bool | None = None
    bisect: bool | None = None


def read_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        InputError: if `path` is no readable TOML file, a key is no option, or a value has the wrong type.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} ({error})", "a readable recipe", "check the path") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}, which is not TOML ({error})", "a recipe in TOML", "mend the line named") from error
    hints = get_type_hints(Recipe)
    keys = {item.name.replace("_", "-"): item.name for item in fields(Recipe)}
    values: dict[str, object] = {}
    for key, value in raw.items():
        if key not in keys:
            near = get_close_matches(key, keys, n=1)
            do = "write refit = false" if key == "no-refit" else f"write {near[0]!r}" if near else "leave it out"
            raise InputError(f"the key {key!r} in {path}", f"one of {', '.join(keys)}", do)
        values[keys[key]] = _value(path, key, value, get_args(hints[keys[key]])[0])
    return Recipe(**values)  # pyright: ignore[reportArgumentType] - every value was checked against its field's type


def _value(path: Path, key: str, value: object, kind: object) -> object:
    texts = [str(item) for item in value] if isinstance(value, list) and _all_text(value) else None  # pyright: ignore[reportUnknownVariableType]
    if key == "passes" and texts is not None:
        return tuple(spec for text in texts for spec in parse_passes(text))
    if kind == tuple[str, ...] and texts is not None:
        return tuple(texts)
    if kind is Path and isinstance(value, str):
        return value if is_function_name(value) else path.parent / value
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and type(value) is kind:
        return value
    expected = {Path: "a path", float: "a number", int: "a whole number", bool: "true or false", str: "text"}
    words = expected.get(kind, "a list of texts") if isinstance(kind, type) else "a list of texts"
    do = f'write {key} = ["{value}"]' if isinstance(value, str) and words == "a list of texts" else "give another value"
    raise InputError(f"{key} = {value!r} in {path}", words, do)


def _all_text(items: Iterable[object]) -> bool:
    return all(isinstance(item, str) for item in items)
