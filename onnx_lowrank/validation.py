"""Is the optimized file valid, is its signature the original's, and how far are its outputs from the original's?

Only the two files on disk are opened: what is compared is what will be deployed, at the target's first level.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from rich.console import Group
from rich.table import Table
from rich.text import Text

from onnx_lowrank.data import Dataset
from onnx_lowrank.error_metrics import error_in
from onnx_lowrank.errors import InputError, InvalidResultError, NonFiniteResultError
from onnx_lowrank.fidelity import FidelityMeter, OutputFidelity
from onnx_lowrank.graph import check_file, load
from onnx_lowrank.side_by_side import batches_for, open_pair
from onnx_lowrank.signature import Signature, TensorSpec, signature_of
from onnx_lowrank.target import Target


@dataclass(frozen=True)
class Validation:
    """The result of a comparison.

    Args:
        original: Path of the original model.
        optimized: Path of the optimized model.
        data: "held-out" for samples the model was not fitted on, "given" where nobody knows, "synthetic" for
            inputs drawn to fit the signature.
        engine: "onnxruntime", or "onnx.reference" for element types the provider has no kernels for.
        samples: Samples compared.
        relative_error: Relative L2 error over all outputs of real numbers.
        outputs: Distances per output.
        max_error: The limit stated for `error(error_metric)`, or None.
        notes: Guesses and exceptions the user should know.
        error_metric: What `max_error` limits; one of `error_metrics.ERROR_METRICS`.
        loss: Damage to all outputs as the search predicts it; see `FidelityMeter.loss`.
    """

    original: str
    optimized: str
    data: str
    engine: str
    samples: int
    relative_error: float
    outputs: tuple[OutputFidelity, ...]
    max_error: float | None = None
    notes: tuple[str, ...] = field(default=())
    error_metric: str = "relative"
    loss: float = 0.0

    def __post_init__(self) -> None:
        """Refuse an error metric the outputs have nothing for."""
        self.error(self.error_metric)

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)

    def error(self, metric: str) -> float:
        """Distance of all outputs in one of `error_metrics.ERROR_METRICS`.

        Raises:
            InputError: if no output has what the metric needs.
        """
        return error_in(metric, self.outputs, self.relative_error)

    def require_valid(self) -> None:
        """Check for non-finite outputs and the stated limit.

        Raises:
            NonFiniteResultError, InvalidResultError: if either is violated.
        """
        file = Path(self.optimized).name
        for output in self.outputs:
            if output.non_finite_new:
                raise NonFiniteResultError(
                    f"{output.non_finite_new} NaN or infinite values in output {output.name!r} of {file}",
                    "finite values wherever the original has them",
                    "use a smaller goal, or keep the layers in front of it with --keep",
                )
        if self.max_error is not None and not (error := self.error(self.error_metric)) <= self.max_error:
            worst = max(self.outputs, key=lambda output: output.relative)
            raise InvalidResultError(
                f"{self.error_metric} error {error:.3g} on {self.data} data; the worst output is {worst.name!r}",
                f"at most {self.max_error:g}",
                "use a smaller goal, or keep sensitive layers with --keep",
            )


def validate(
    original: Path,
    optimized: Path,
    target: Target,
    dataset: Dataset | None = None,
    max_error: float | None = None,
    *,
    seed: int = 0,
    error_metric: str = "relative",
) -> Validation:
    """`compare`, then `Validation.require_valid`: returns only for a valid result.

    Raises:
        InvalidResultError: in either.
        InputError, ProviderError: if a file cannot be read or run.
    """
    validation = compare(original, optimized, target, dataset, max_error, seed=seed, error_metric=error_metric)
    validation.require_valid()
    return validation


def compare(
    original: Path,
    optimized: Path,
    target: Target,
    dataset: Dataset | None = None,
    max_error: float | None = None,
    *,
    seed: int = 0,
    error_metric: str = "relative",
    most: int | None = None,
) -> Validation:
    """Check the file and the signature, run both models and measure the distance of their outputs.

    Args:
        original: The model before.
        optimized: The model after.
        target: Where to run; its first optimization level is used, and its shapes for synthetic inputs.
        dataset: Held-out samples, or None for seeded synthetic inputs.
        max_error: Limit for the error; kept in the result, see `Validation.require_valid`.
        seed: Seed of the synthetic inputs.
        error_metric: What `max_error` limits; for "kl" all scores are called logits.
        most: Run on so many batches at most.

    Raises:
        InvalidResultError: if the checker refuses the optimized file or its signature is not the original's.
        InputError, ProviderError: if a file cannot be read or run.
    """
    before, after = _read(original), _read(optimized)
    check_file(optimized, load(original).tolerated)
    _check_signature(optimized, signature_of(before), signature_of(after))
    pair = open_pair(original, optimized, target)
    batches, notes = batches_for(before, target, dataset, seed=seed, small=not pair.exact)
    if not pair.exact:
        notes.append(f"{target.provider_name} has no kernels for the element types used: compared with {pair.engine}")
    meter, samples = FidelityMeter(scores_are_logits=error_metric == "kl"), 0
    for reference, candidate, count in pair.outputs(islice(batches, most)):
        meter.update(reference, candidate, count)
        samples += count
    return Validation(
        original=str(original),
        optimized=str(optimized),
        data="held-out" if dataset is not None else "synthetic",
        engine=pair.engine,
        samples=samples,
        relative_error=meter.relative_error,
        outputs=meter.result(),
        max_error=max_error,
        notes=tuple(notes),
        error_metric=error_metric,
        loss=meter.loss,
    )


def render(validation: Validation) -> Group:
    """A table of one row per output, and what it was measured on, for a terminal."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("output", overflow="fold")
    columns = ("rel. L2", "p50", "p99", "worst", "max abs", "mean abs", "cosine", "KL", "top-1 agrees")
    for column in columns:
        table.add_column(column, justify="right")
    for output in validation.outputs:
        numbers = (
            output.relative,
            *(output.percentiles[share] for share in ("50", "99", "100")),
            output.max_absolute,
            output.mean_absolute,
        )
        kl = "" if output.kl is None else f"{output.kl:.2e}"
        agreement = "" if output.top1_agreement is None else f"{output.top1_agreement:.2%}"
        table.add_row(output.name, *(f"{n:.2e}" for n in numbers), f"{output.cosine:.6f}", kl, agreement)
    heading = (
        f"relative error {validation.relative_error:.3g} over all outputs on "
        f"{validation.samples} {validation.data} samples ({validation.engine})"
    )
    if validation.error_metric != "relative":
        heading = f"{validation.error_metric} error {validation.error(validation.error_metric):.3g}; {heading}"
    return Group(Text(heading), table, *(Text(f"note: {note}", style="yellow") for note in validation.notes))


def _read(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path, load_external_data=False)
    except (OSError, DecodeError, ValueError) as error:
        raise InputError(f"{path}, which cannot be read ({error})", "an ONNX model", "check the path") from error


def _check_signature(path: Path, before: Signature, after: Signature) -> None:
    for kind, olds, news in (("inputs", before.inputs, after.inputs), ("outputs", before.outputs, after.outputs)):
        if olds != news:
            changed = [spec for spec in news if spec not in olds] or news
            wanted = [spec for spec in olds if spec not in news] or olds
            raise InvalidResultError(
                f"{kind} {_specs(changed)} in {path}",
                f"{_specs(wanted)} as in the original",
                "find the pass with --bisect, and report it",
            )


def _specs(specs: Collection[TensorSpec]) -> str:
    return ", ".join(map(str, specs))
