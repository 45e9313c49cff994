"""Arrays as they were given, checked against a model's inputs and cast to their types, become a `Dataset`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from onnx_lowrank.data.dataset import LABEL, SOURCE, Dataset, Part
from onnx_lowrank.errors import InputError
from onnx_lowrank.signature import TensorSpec

Arrays = dict[str, NDArray[np.generic]]
Signature = Sequence[TensorSpec]
Found = tuple[str, Part]  # where it was found, and what


def fitted(where: str, arrays: Arrays, signature: Signature) -> Part:
    """Arrays of one file or feed: one per input, and maybe `label` and `source`, unless inputs are called so.

    Args:
        where: Named in errors.
        arrays: Name -> (samples, ...).
        signature: The inputs.

    Raises:
        InputError: if an array is missing, unknown, or does not fit.
    """
    names = [spec.name for spec in signature]
    reserved = [name for name in (LABEL, SOURCE) if name not in names]
    missing, unknown = [n for n in names if n not in arrays], [n for n in arrays if n not in (*names, *reserved)]
    if missing:
        raise InputError(
            f"no array {_listed(missing)} in {where}", f"one per input: {_listed(names)}", "add the missing"
        )
    if unknown:
        right = f"the inputs {_listed(names)}" + (f" and optionally {_listed(reserved)}" if reserved else "")
        raise InputError(f"unknown arrays {_listed(unknown)} in {where}", right, "rename or remove them")
    cast = {spec.name: _array(where, spec, arrays[spec.name]) for spec in signature}
    extras = {name: arrays[name] for name in reserved if name in arrays}
    for name, array in extras.items():
        _refuse_non_finite(where, name, array)
    _check_counts(where, cast | extras)
    return Part(cast, extras.get(LABEL), _sources(where, extras.get(SOURCE)))


def gathered(origin: str, found: Sequence[Found], signature: Signature) -> Dataset:
    """One dataset of all parts found, those of equal shapes joined, in whole batches.

    Raises:
        InputError: if the parts do not go together, or do not fill a batch.
    """
    if not found:
        raise InputError(f"no samples in {origin}", "at least one", "add samples")
    whole = _whole(found, signature)
    _check_alike(found, "labels", lambda part: part.labels)
    _check_alike(found, "sources", lambda part: part.sources)
    groups: dict[object, list[Part]] = {}
    for _, part in found:
        extra = None if part.labels is None else part.labels.shape[1:]
        key = (tuple(array.shape[1:] for array in part.arrays.values()), extra)
        groups.setdefault(key, []).append(part)
    parts = tuple(_together(group) for group in groups.values())
    data = Dataset(parts, whole, _fixed_batch(origin, signature, whole), origin)
    full = data.in_whole_batches()
    left = len(data) - len(full)
    note = f"{left} of {len(data)} samples are not used: the model takes {data.batch} at a time"
    return replace(full, notes=(note,)) if left else full


def _array(where: str, spec: TensorSpec, array: NDArray[np.generic]) -> NDArray[np.generic]:
    """The array in the input's type, if its type, rank, shape and values fit."""
    named = f"array {spec.name!r} in {where}"
    rank = len(spec.shape)
    if array.ndim not in {rank, rank + 1} or array.ndim == 0:
        right = f"{rank or 1} axes like input {spec}, samples first" if rank else "one value per sample"
        raise InputError(f"{named} with {array.ndim} axes", right, "reshape it")
    tail = spec.shape if array.ndim > rank else spec.shape[1:]
    if any(isinstance(dim, int) and dim != size for dim, size in zip(tail, array.shape[1:], strict=True)):
        shape = "x".join(map(str, array.shape))
        raise InputError(f"{named} of shape {shape}", f"samples of input {spec}", "resize or reshape it")
    cast = _cast(spec, array)
    if cast is None:
        wanted = TensorProto.DataType.Name(spec.elem_type).lower()
        raise InputError(f"{named} of type {array.dtype}", f"{wanted}, or integers that convert exactly", "convert it")
    _refuse_non_finite(where, spec.name, array)
    return cast


def _cast(spec: TensorSpec, array: NDArray[np.generic]) -> NDArray[np.generic] | None:
    """The array in the input's type if no value changes, else None; bfloat16 is rounded to, as no .npz can hold it."""
    if spec.elem_type == TensorProto.STRING:
        return array.astype(object) if array.dtype.kind in "US" else None
    wanted = spec.dtype
    if array.dtype.kind not in "fiub" or spec.elem_type == TensorProto.UNDEFINED:
        return None
    if spec.is_floating and wanted.kind != "f":
        return array.astype(wanted)
    if np.can_cast(array.dtype, wanted, "safe"):
        return array.astype(wanted, copy=False)
    if array.dtype.kind == "f" or wanted.kind == "b":
        return None
    cast = array.astype(wanted)
    return cast if np.array_equal(cast.astype(array.dtype), array) else None


def _sources(where: str, array: NDArray[np.generic] | None) -> NDArray[np.str_] | None:
    if array is None:
        return None
    if array.ndim != 1 or array.dtype.kind not in "iuUS":
        found = f"array {SOURCE!r} in {where} of type {array.dtype} with {array.ndim} axes"
        raise InputError(found, "one whole number or text per sample", "name where each sample comes from")
    return array.astype(np.str_)


def _refuse_non_finite(where: str, name: str, array: NDArray[np.generic]) -> None:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        count = int(np.count_nonzero(~np.isfinite(array)))
        raise InputError(
            f"{count} NaN or infinite values in array {name!r} of {where}", "finite values", "clean the data"
        )


def _check_counts(where: str, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    counts = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name}: {count}" for name, count in counts.items())
        raise InputError(f"different numbers of samples in {where} ({listed})", "the same number", "align the arrays")
    if 0 in counts.values():
        raise InputError(f"no samples in {where}", "at least one", "add samples")


def _whole(found: Iterable[Found], signature: Signature) -> frozenset[str]:
    """Inputs with one axis more than the signature says; the same everywhere."""
    kinds = {
        frozenset(spec.name for spec in signature if part.arrays[spec.name].ndim > len(spec.shape)): where
        for where, part in found
    }
    if len(kinds) > 1:
        (_, one), (_, other) = list(kinds.items())[:2]
        raise InputError(f"arrays with different numbers of axes in {one} and {other}", "the same", "write all alike")
    return next(iter(kinds))


def _check_alike(found: Iterable[Found], what: str, of: Callable[[Part], NDArray[np.generic] | None]) -> None:
    kinds: dict[str, str] = {}
    for where, part in found:
        array = of(part)
        kinds.setdefault("none" if array is None else "text" if array.dtype.kind in "US" else "numbers", where)
    if len(kinds) > 1:
        listed = ", ".join(f"{kind} in {where}" for kind, where in kinds.items())
        raise InputError(f"{what} of different kinds ({listed})", f"{what} of one kind for all samples", "align them")


def _together(group: Sequence[Part]) -> Part:
    if len(group) == 1:
        return group[0]
    arrays = {name: np.concatenate([part.arrays[name] for part in group]) for name in group[0].arrays}
    labels = [part.labels for part in group if part.labels is not None]
    sources = [part.sources for part in group if part.sources is not None]
    return Part(arrays, np.concatenate(labels) if labels else None, np.concatenate(sources) if sources else None)


def _fixed_batch(origin: str, signature: Signature, whole: frozenset[str]) -> int | None:
    fixed = {
        spec.name: spec.shape[0] for spec in signature if spec.name not in whole and isinstance(spec.shape[0], int)
    }
    sizes = set(fixed.values()) | ({1} if whole else set())
    if len(sizes) > 1:
        listed = ", ".join(f"{name}: {size}" for name, size in fixed.items())
        right = "one batch size"
        raise InputError(
            f"inputs with different leading dimensions ({listed}) in {origin}",
            right,
            "give each array one more axis, samples first",
        )
    return next(iter(sizes), None)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)
