"""What the user calls samples: an .npz file, a folder of arrays or images, or a function that yields feeds."""

from __future__ import annotations

from pathlib import Path

from onnx_lowrank.data.archive import load_npz
from onnx_lowrank.data.dataset import Dataset
from onnx_lowrank.data.feeding import read_function
from onnx_lowrank.data.fitting import Signature, fitted, gathered
from onnx_lowrank.data.folder import read_folder
from onnx_lowrank.errors import InputError
from onnx_lowrank.user_function import FORM, is_function_name


def read_samples(
    spec: Path | str, signature: Signature, *, preprocess: str | None = None, limit: int | None = None
) -> Dataset:
    """Read samples for the inputs of `signature`.

    Args:
        spec: An .npz file; a folder of .npy and .npz files, or of images; or `module:function`.
        signature: The inputs.
        preprocess: How images become arrays, see `preprocessing`; by default as preprocess.txt in their folder says.
        limit: Number of samples to use at most, or None for all.

    Raises:
        InputError: if something in it does not fit.
    """
    path = Path(spec)
    if path.is_dir():
        return read_folder(path, signature, preprocess, limit)
    if path.exists():
        return read_npz(path, signature).thinned(limit).in_whole_batches()
    if is_function_name(str(spec)):
        return read_function(str(spec), signature, limit)
    raise InputError(f"{spec}, which does not exist", f"an .npz file, a folder or {FORM}", "check the path")


def read_npz(path: Path, signature: Signature) -> Dataset:
    """Samples of an .npz file: arrays named like the inputs, the leading axis being the samples.

    An array `label` holds labels; an array `source`, whole numbers or text, says what each sample comes from.

    Raises:
        InputError: if the file or an array in it does not fit.
    """
    return gathered(str(path), [(str(path), fitted(str(path), load_npz(path), signature))], signature)
