"""Decompositions of third parties, held to the protocol: what they hand out is checked, with samples it is measured.

A method may look at the inputs' second moment G or not. Whatever it hands out is the start of a sweep of least squares
in the metric of G (`multilinear.refine`), and the error that is told is measured on the arrays,

    sqrt(tr((M - M') G (M - M')^T) / tr(M G M^T)),

so that it means what it means for the formats beside it. Exceptions and values that would be found much later, in the
table of candidates or in a graph, end the command with the name of the method and the line of its code.
"""

from __future__ import annotations

import math
import operator
import traceback
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from onnx_lowrank.chain import Chain
from onnx_lowrank.decomposition import Decomposition, Factorization, Rank
from onnx_lowrank.errors import LowRankError, PassError
from onnx_lowrank.layer import Array, LayerShape
from onnx_lowrank.passes.decompose.fitted import Fitted

_SAME = ("name", "on_request", "depthwise", "whole_rows", "structure")
_EXACT = 1e-3  # also of factors made in single precision
_DO = "mend or remove that package, or leave it out with --passes"


@dataclass(frozen=True)
class ThirdParty(Decomposition):
    """A decomposition of a third party.

    Every method raises PassError where that of `inner` fails or does not keep to the protocol.

    Args:
        inner: The decomposition.
    """

    inner: Decomposition
    by_rank: ClassVar[bool] = True  # with samples there is a sweep for every rank

    def __post_init__(self) -> None:
        """Take over what the class says of itself."""
        vars(self).update({name: getattr(self.inner, name) for name in _SAME})

    @property
    def options(self) -> dict[str, object]:
        """Those of the decomposition."""
        return asdict(self.inner)  # pyright: ignore[reportArgumentType] - only dataclasses are listed

    def refusal(self, shape: LayerShape) -> str | None:
        """Its sentence or None."""
        with _blaming(self.inner, shape):
            return self._sentence("refusal", self.inner.refusal(shape), shape)

    def ranks(self, shape: LayerShape, block: int) -> Sequence[Rank]:
        """Its ranks, of Python's numbers."""
        with _blaming(self.inner, shape):
            return [_rank(rank) for rank in self.inner.ranks(shape, block)]

    def chain(self, shape: LayerShape, rank: Rank) -> Chain:
        """Its chain, if that gives a weight of the layer's shape."""
        with _blaming(self.inner, shape):
            found = self.inner.chain(shape, rank)
            sizes = [size for stage in found.stages for size in stage.weight]
            dense = tuple(math.prod(found.sizes[letter] for letter in axis) for axis in found.axes)
        if not all(type(size) is int for size in sizes):
            raise self.fault(f"sizes of stages that are no int at rank {rank}", "Python's whole numbers", shape)
        if dense != shape.weight:
            raise self.fault(f"a chain that gives {dense} at rank {rank}", str(shape.weight), shape)
        return found

    def factorize(self, weight: Array, gram: Array | None = None, *, most: Rank | None = None) -> Factorization:
        """Its factorization, checked; with samples its errors are measured."""
        groups, out, in_, *kernel = weight.shape
        shape = LayerShape(groups, out, in_, tuple(kernel))
        with _blaming(self.inner, shape):
            made = self.inner.factorize(weight, gram, most=most)
        return self.held(made, weight, gram, shape)

    def held(self, made: object, weight: Array, gram: Array | None, shape: LayerShape) -> Factorization:
        """A factorization of its, checked; measured where there is `gram`."""
        if not isinstance(made, Factorization):
            raise self.fault(f"{type(made).__name__} from factorize", "a Factorization", shape)
        checked = _Checked(self, made, shape)
        return checked if gram is None else _Measured(checked, weight, gram)

    def promising(self, weight: Array, shares: Mapping[Rank, float]) -> Sequence[Rank]:
        """Those of the ranks that it names."""
        groups, out, in_, *kernel = weight.shape
        with _blaming(self.inner, LayerShape(groups, out, in_, tuple(kernel))):
            named = {_rank(rank) for rank in self.inner.promising(weight, shares)}
        return [rank for rank in shares if rank in named]

    def exact_rank(self, shape: LayerShape) -> Rank | None:
        """Its rank or None."""
        with _blaming(self.inner, shape):
            found = self.inner.exact_rank(shape)
            return None if found is None else _rank(found)

    def misfit(self, shape: LayerShape, rank: Rank) -> str | None:
        """Its sentence or None."""
        with _blaming(self.inner, shape):
            return self._sentence("misfit", self.inner.misfit(shape, rank), shape)

    def fault(self, got: str, expected: str, shape: LayerShape) -> PassError:
        """What a user reads where it does not keep to the protocol."""
        return PassError(self.name, None, f"{got} for {shape}", expected, _DO)

    def _sentence(self, what: str, found: object, shape: LayerShape) -> str | None:
        if found is None or (isinstance(found, str) and found):
            return found
        raise self.fault(f"the {what} {found!r}", "a sentence, or None", shape)


class _Checked(Factorization):
    """What a third party's factorization hands out, checked.

    Args:
        method: The decomposition.
        made: Its factorization.
        shape: Of the weight.
    """

    def __init__(self, method: ThirdParty, made: Factorization, shape: LayerShape) -> None:
        self.method, self.made, self.shape = method, made, shape

    def error(self, rank: Rank) -> float:
        """A finite number of Python's."""
        with self.blaming():
            found = self.made.error(rank)
        return self._number("error", found, rank)

    def spectral_error(self, rank: Rank) -> float | None:
        """A finite number of Python's, or None: it is measured then."""
        with self.blaming():
            found = self.made.spectral_error(rank)
        return None if found is None else self._number("spectral error", found, rank)

    def factors(self, rank: Rank) -> tuple[Array, ...]:
        """Finite arrays of the shapes of the chain's stages."""
        with self.blaming():
            found = self.made.factors(rank)
        return self._arrays(found, rank)

    def data_free(self, rank: Rank) -> tuple[Array, ...] | None:
        """Likewise, or None."""
        with self.blaming():
            found = self.made.data_free(rank)
        return None if found is None else self._arrays(found, rank)

    def note(self, rank: Rank) -> str:
        """Its note, as text."""
        with self.blaming():
            return str(self.made.note(rank))

    def blaming(self) -> AbstractContextManager[None]:
        """Errors of the third party's code are told as such."""
        return _blaming(self.method.inner, self.shape)

    def _number(self, what: str, told: float, rank: Rank) -> float:
        with self.blaming():
            found = float(told)
        if not (math.isfinite(found) and found >= 0):
            raise self.method.fault(f"{what} {found} at rank {rank}", "a finite number, not negative", self.shape)
        return found

    def _arrays(self, found: Sequence[Array], rank: Rank) -> tuple[Array, ...]:
        with self.blaming():
            arrays = tuple(np.asarray(array) for array in found)
        shapes = [array.shape for array in arrays]
        wanted = [stage.weight for stage in self.method.chain(self.shape, rank).stages]
        if shapes != wanted:
            raise self.method.fault(f"factors of shapes {shapes} at rank {rank}", str(wanted), self.shape)
        if not all(array.dtype.kind == "f" and np.isfinite(array).all() for array in arrays):
            raise self.method.fault(f"factors that are not all finite at rank {rank}", "finite floats", self.shape)
        return arrays


class _Measured(Fitted):
    """What a third party's factorization hands out, moved to the metric of the samples and measured there.

    Args:
        checked: The factorization.
        weight: (g, S, C, *kernel).
        gram: (g, n, n).
    """

    def __init__(self, checked: _Checked, weight: Array, gram: Array) -> None:
        super().__init__(checked.method, weight, gram)
        self.checked = checked

    def fit(self, rank: Rank) -> tuple[Array, ...]:
        """Where the sweep starts."""
        return self.checked.factors(rank)

    def exact(self) -> tuple[Array, ...]:
        """What is handed out at the exact rank, if that is the weight."""
        rank = self.method.exact_rank(self.shape) or ()
        found = self.checked.factors(rank)
        missing = np.linalg.norm(self.weight - self.method.chain(self.shape, rank).dense(found))
        if missing > _EXACT * np.linalg.norm(self.weight):
            got = f"another weight from the factors at the exact rank {rank}"
            raise self.checked.method.fault(got, "the layer's", self.shape)
        return found

    def data_free(self, rank: Rank) -> tuple[Array, ...] | None:
        """What the third party's own fit started from, where it looked at the samples."""
        return self.checked.data_free(rank)

    def note(self, rank: Rank) -> str:
        """What the third party's factorization notes."""
        return self.checked.note(rank)

    def in_metric(self, gram: Array, rank: Rank) -> Factorization | None:
        """The third party's own, if it saves something, measured."""
        with self.checked.blaming():
            found = self.checked.made.in_metric(gram, rank)
        return None if found is None else self.checked.method.held(found, self.weight, gram, self.shape)


def failure(name: str, error: Exception, module: str, where: str = "") -> PassError:
    """What a user reads where an exception leaves a third party's code.

    Args:
        name: The pass.
        error: What was raised.
        module: That of the pass; the innermost line of its package is named.
        where: What it was about.
    """
    package = module.partition(".")[0]
    place = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        if str(frame.f_globals.get("__name__")).partition(".")[0] == package:
            place = f" ({Path(frame.f_code.co_filename).name}, line {line})"
    got = f"{type(error).__name__}: {error}{place}{where}"
    return PassError(name, None, got, "a decomposition that runs through", f"{_DO}; -v shows the traceback")


@contextmanager
def _blaming(method: Decomposition, shape: LayerShape) -> Generator[None]:
    try:
        yield
    except LowRankError:  # on purpose
        raise
    except Exception as error:
        raise failure(method.name, error, type(method).__module__, f" for {shape}") from error


def _rank(found: Sequence[int]) -> Rank:
    return tuple(operator.index(entry) for entry in found)
