"""Inputs drawn at random to fit a signature, for models without data; results on them are called synthetic.

Real numbers are standard normal, masks are ones, indices stay small or within the bounds given. Dimensions the model
leaves open are taken from the user's shapes, else guessed, and every guess is said.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from onnx_lowrank.errors import InputError
from onnx_lowrank.signature import Dim, TensorSpec
from onnx_lowrank.target import Target

Shape = tuple[int, ...]
IMAGE_SIZE = 224
OTHER_SIZE = 64
LARGEST_INPUT = 1 << 28
_SAMPLE_RATE = 16_000
_SEQUENCE_WORDS = ("seq", "time", "len", "frame", "token")


def resolve_shapes(
    signature: Sequence[TensorSpec],
    given: Mapping[str, Shape],
    image_size: int = IMAGE_SIZE,
    other_size: int = OTHER_SIZE,
) -> tuple[dict[str, Shape], list[str]]:
    """A concrete shape for every input, and a note for each that had to be guessed.

    Shapes given bind the symbols in them, so that one input's length holds for the others too. What stays open is 1 for
    batches, `image_size` for the height and width of images (4-D with 1, 3 or an open number of channels), else
    `other_size`.

    Raises:
        InputError: if `given` names an unknown input, has another rank, or contradicts a fixed dimension.
    """
    specs = {spec.name: spec for spec in signature}
    bound: dict[str, int] = {}
    for name, shape in given.items():
        spec = specs.get(name)
        if spec is None:
            known = ", ".join(repr(other) for other in specs)
            raise InputError(f"--shape for unknown input {name!r}", f"one of {known}", "name one of these")
        _check_shape(spec, shape)
        for dim, size in zip(spec.shape, shape, strict=True):
            if isinstance(dim, str):
                bound.setdefault(dim, size)
    shapes: dict[str, Shape] = {}
    notes: list[str] = []
    for spec in signature:
        if spec.elem_type == TensorProto.UNDEFINED:
            raise InputError(f"input {spec.name!r}, which is no tensor", "tensor inputs", "use another model")
        if spec.name in given:
            shapes[spec.name] = given[spec.name]
            _check_size(spec, given[spec.name])
            continue
        shapes[spec.name], guessed = _filled(spec, bound, image_size, other_size)
        _check_size(spec, shapes[spec.name])
        if guessed:
            notes.append(sized(spec, shapes[spec.name]))
    if shapes and all(0 in shape for shape in shapes.values()):
        listed = ", ".join(map(str, signature))
        raise InputError(f"no value in any input ({listed})", "inputs that hold something", "export the model again")
    return shapes, notes


def sized(spec: TensorSpec, shape: Shape) -> str:
    """What the user reads of an input whose sizes were not given."""
    text = _text(shape)
    return f"input {spec} is taken as {text}; set it with --shape {spec.name}={text}"


def synthetic_feeds(
    signature: Sequence[TensorSpec],
    shapes: Mapping[str, Shape] | None,
    seed: int,
    bounds: Mapping[str, tuple[float, float]] | None = None,
) -> dict[str, NDArray[np.generic]]:
    """One feed for every input; the same seed gives the same values.

    Args:
        signature: The model's inputs.
        shapes: A shape for every input; None: `resolve_shapes` without any given.
        seed: Seed of the generator.
        bounds: Smallest and largest value of inputs where they are known (see `signature.index_bounds`).
    """
    if shapes is None:
        shapes, _ = resolve_shapes(signature, {})
    rng = np.random.default_rng(seed)
    open_sizes = [size for shape in shapes.values() for size in shape[1:]]
    length = min(open_sizes, default=1)
    return {spec.name: _draw(spec, shapes[spec.name], rng, (bounds or {}).get(spec.name), length) for spec in signature}


def batch_size(signature: Sequence[TensorSpec], target: Target) -> int:
    """The batch the target is timed with, else 1: a model exported with an open batch may not take others."""
    given = target.shapes[0].shapes if target.shapes else {}
    return leading_size(signature, resolve_shapes(signature, given)[0])


def leading_size(signature: Sequence[TensorSpec], shapes: Mapping[str, Shape]) -> int:
    """Leading dimension of the first input that has one."""
    return next((shapes[spec.name][0] for spec in signature if shapes[spec.name]), 1)


def at_batch(
    signature: Sequence[TensorSpec], given: Mapping[str, Shape], batch: int, label: str
) -> tuple[tuple[TensorSpec, ...], dict[str, Shape]]:
    """The signature, and shapes given for it, with the open batch dimensions set to `batch`.

    These are the dimensions called batch, and open leading ones unless their name speaks of a sequence; a symbol that
    leads one input is the batch in the others too.

    Raises:
        InputError: if none is open and the model, called `label`, takes another batch.
    """
    leading = {spec.shape[0] for spec in signature if spec.shape and _leads(spec.shape)} - {None}

    def fixed(spec: TensorSpec, sizes: Sequence[Dim]) -> tuple[Dim, ...]:
        named = [isinstance(dim, str) and "batch" in dim.lower() for dim in spec.shape]
        shared = [dim in leading and spec.shape.count(dim) == 1 for dim in spec.shape]  # "?" may stand for anything
        first = [axis == 0 and _leads(spec.shape) for axis in range(len(spec.shape))]
        return tuple(
            batch if any(reasons) else size for size, *reasons in zip(sizes, named, shared, first, strict=True)
        )

    specs = tuple(replace(spec, shape=fixed(spec, spec.shape)) for spec in signature)
    first = next((spec for spec in signature if spec.shape), None)
    if specs == tuple(signature) and (first is None or first.shape[0] != batch):
        got = f"--batch {batch} for {label}"
        if first is None or not isinstance(first.shape[0], int):
            raise InputError(f"{got}, none of whose inputs has a batch dimension", "one that has", "leave --batch out")
        raise InputError(
            f"{got}, whose input {first} has a fixed batch of {first.shape[0]}",
            f"--batch {first.shape[0]}",
            "export the model with an open batch to time others",
        )
    by_name = {spec.name: spec for spec in signature}
    fit = {name for name, shape in given.items() if name in by_name and len(shape) == len(by_name[name].shape)}
    shapes = {
        name: tuple(int(dim or 0) for dim in fixed(by_name[name], shape)) if name in fit else shape
        for name, shape in given.items()
    }
    return specs, shapes


def _leads(shape: Sequence[Dim]) -> bool:
    """Whether the leading dimension is an open one that may count samples."""
    return not isinstance(shape[0], int) and not any(word in (shape[0] or "").lower() for word in _SEQUENCE_WORDS)


def _draw(
    spec: TensorSpec,
    shape: Shape,
    rng: np.random.Generator,
    bounds: tuple[float, float] | None,
    length: int,
) -> NDArray[np.generic]:
    if spec.elem_type == TensorProto.STRING:
        return np.full(shape, "text", dtype=object)
    if spec.is_floating:
        values = rng.standard_normal(shape) if bounds is None else rng.uniform(*bounds, shape)
    elif "mask" in spec.name.lower():
        values = np.ones(shape)
    elif bounds is not None:
        values = rng.integers(int(bounds[0]), int(bounds[1]), shape, endpoint=True)
    else:
        values = _draw_integers(spec, shape, rng, length)
    return np.asarray(values).astype(spec.dtype)


def _draw_integers(spec: TensorSpec, shape: Shape, rng: np.random.Generator, length: int) -> NDArray[np.generic]:
    """Values plausible for what the input's name says; small, as they may index a table of unknown size."""
    name = spec.name.lower()
    if name in {"sr", "sample_rate", "sampling_rate"}:
        return np.full(shape, _SAMPLE_RATE)
    if "length" in name or name.endswith("_len"):
        return np.full(shape, length)
    if "position" in name and shape:
        return np.broadcast_to(np.arange(shape[-1]), shape)
    largest = 1 if spec.elem_type == TensorProto.BOOL or "type" in name or "segment" in name else 9
    return np.asarray(rng.integers(0, largest, shape, endpoint=True))


def _check_shape(spec: TensorSpec, shape: Shape) -> None:
    option = f"--shape {spec.name}={_text(shape)}"
    if len(shape) != len(spec.shape):
        raise InputError(
            f"{option} with {len(shape)} dimensions", f"{len(spec.shape)} as in input {spec}", "correct it"
        )
    if not spec.fits(shape):
        raise InputError(option, f"a shape that fits input {spec}", "change the open dimensions only")


def _check_size(spec: TensorSpec, shape: Shape) -> None:
    if math.prod(shape) > LARGEST_INPUT:
        raise InputError(
            f"input {spec} of shape {_text(shape)}", f"at most {LARGEST_INPUT:,} values", "give a smaller --shape"
        )


def _filled(spec: TensorSpec, bound: dict[str, int], image_size: int, other_size: int) -> tuple[Shape, bool]:
    """The shape with every open dimension filled, and whether one was guessed; `bound` learns the symbols guessed."""
    guessed = False
    sizes: list[int] = []
    for axis, dim in enumerate(spec.shape):
        if isinstance(dim, int):
            sizes.append(dim)
            continue
        known = None if dim is None else bound.get(dim)
        guessed |= known is None
        sizes.append(known or _guess(spec, axis, image_size, other_size))
        if dim is not None:
            bound[dim] = sizes[-1]
    return tuple(sizes), guessed


def _guess(spec: TensorSpec, axis: int, image_size: int, other_size: int) -> int:
    dim = str(spec.shape[axis] or "").lower()
    sequence = any(word in dim for word in _SEQUENCE_WORDS)
    if "batch" in dim or (axis == 0 and not sequence):
        return 1
    if len(spec.shape) == 4 and spec.is_floating and not sequence:
        channels_last = spec.shape[3] in {1, 3}
        if not channels_last and axis == 1:
            return 3
        if axis in ({1, 2} if channels_last else {2, 3}) and (
            channels_last or spec.shape[1] in {1, 3} or _open(spec, 1)
        ):
            return image_size
    return other_size


def _open(spec: TensorSpec, axis: int) -> bool:
    return not isinstance(spec.shape[axis], int)


def _text(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "scalar"
