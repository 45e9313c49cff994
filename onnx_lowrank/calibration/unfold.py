"""What a layer sees, as rows: unfolded inputs c and outputs y of one node, so that y = M c + b row by row.

Rows are positions: output pixels of a convolution, leading indices of a product. Where there are more than are wanted,
the same seeded positions are taken of every sample, whatever the batch it comes in. Positions that are padding (see
`padding`) are passed over. A matrix is read as samples with as many rows each, one after the other.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from onnx_lowrank.layer import Array, Form, Geometry, LayerShape, Shape

Values = NDArray[np.generic]
Counted = NDArray[np.bool_]
# Rows of a layer: more make its moments better and take longer. Not fewer than this many per unfolded input, else as
# many as this many multiplications pay for, up to a limit.
ROWS_PER_INPUT = 4
WORK = 4e11
MOST_ROWS = 40_000


def rows_per_sample(shape: LayerShape, samples: int, seen: int | None = None) -> int:
    """Positions to take of each of `samples` for a layer, of whose inputs `seen` numbers are kept; None: all."""
    n = seen or shape.inputs
    rows = max(ROWS_PER_INPUT * n, min(WORK / (shape.groups * n * shape.inputs), MOST_ROWS))
    return math.ceil(rows / max(samples, 1))


@dataclass(frozen=True, eq=False)
class Fed:
    """What is known of a batch that was fed.

    Args:
        samples: How many are in it.
        counted: (samples, positions), false where a position is padding; None: all count.
    """

    samples: int
    counted: Counted | None


@dataclass(frozen=True)
class Unfolding:
    """How the rows of one layer's node are read off its input and output.

    Args:
        form: The node.
        shape: The layer's sizes.
        rows_per_sample: Positions taken of every sample.
        seed: Decides which.
    """

    form: Form
    shape: LayerShape
    rows_per_sample: int
    seed: int = 0

    @property
    def reading(self) -> Hashable:
        """Equal for layers that take the same rows of the same input."""
        form, shape = self.form, self.shape
        where = (form.geometry, form.side, form.transposed_input, form.batch)
        return (*where, shape.groups, shape.in_, shape.kernel, self.rows_per_sample, self.seed)

    def rows(self, x: Values, counted: Counted | None = None, samples: int | None = None) -> Array:
        """Unfolded inputs of one batch, (rows, groups, n), in real numbers; n = in prod(kernel), order (c, kernel).

        Args:
            x: What the node reads.
            counted: (samples, positions), false where a position is padding; None: all count. Heeded where x is
                (samples, positions, width).
            samples: Samples in the batch, for a matrix, which does not tell; None: each row may be one.
        """
        if self.form.geometry is not None:
            size = self.form.geometry.output_size(x.shape[2:], self.shape.kernel)
            return _patches(_real(x), self.form.geometry, self.shape, self._positions(size), size)
        return self._product_rows(_real(x), self.shape.in_, counted, samples, transposed=self.form.transposed_input)

    def targets(self, y: Values, counted: Counted | None = None, samples: int | None = None) -> Array:
        """Outputs at the same positions, (rows, groups, out)."""
        if self.form.geometry is None:
            return self._product_rows(_real(y), self.shape.out, counted, samples, transposed=False)
        picked = _real(y)[(slice(None), slice(None), *self._positions(y.shape[2:]))]
        return picked.swapaxes(1, 2).reshape(-1, self.shape.groups, self.shape.out)

    def _positions(self, size: Shape) -> tuple[NDArray[np.intp], ...]:
        """Output positions taken, one index array per spatial axis."""
        return np.unravel_index(self._chosen(math.prod(size), size), size)

    def _chosen(self, count: int, key: Shape) -> NDArray[np.intp]:
        if count <= self.rows_per_sample:
            return np.arange(count)
        rng = np.random.default_rng([self.seed, zlib.crc32(repr(key).encode())])
        return np.sort(rng.choice(count, self.rows_per_sample, replace=False))

    def _product_rows(
        self, array: Array, width: int, counted: Counted | None, samples: int | None, *, transposed: bool
    ) -> Array:
        """Rows of one operand of y = x W^T; a stack of products has one group per matrix."""
        if counted is not None and self._is_tokens(array.shape, counted, transposed=transposed):
            return array.reshape(*counted.shape, 1, width)[self._taken(counted)]
        if transposed:
            array = array.T
        if self.form.side == "left" and array.ndim > 1:  # a vector is a column on the right, too
            array = array.swapaxes(-1, -2)
        batch, groups = self.form.batch, self.shape.groups
        lead = np.broadcast_shapes(array.shape[:-2], batch)
        length = array.shape[-2] if array.ndim > 1 else 1
        stacked = np.broadcast_to(array.reshape(*array.shape[:-2], length, width), (*lead, length, width))
        if not lead:
            return self._matrix_rows(stacked, samples)
        if groups > 1:
            # Axes of the stack are told from those its matrices are broadcast over.
            sizes = (1,) * (len(lead) - len(batch)) + batch
            order = sorted(range(len(lead)), key=lambda axis: sizes[axis] > 1)
            ordered = stacked.transpose(*order, -2, -1).reshape(-1, groups, length, width)
            flat = ordered.swapaxes(1, 2)
        else:
            flat = stacked.reshape(lead[0], -1, 1, width)
        chosen = self._chosen(flat.shape[1], flat.shape[1:2])
        return flat[:, chosen].reshape(-1, groups, width)

    def _matrix_rows(self, matrix: Array, samples: int | None) -> Array:
        """Rows of (length, width), at most as many as are wanted of all samples; one row per sample stays whole."""
        length, width = matrix.shape
        count = length if samples is None else samples
        if length % max(count, 1):  # rows that depend on values belong to no sample in particular
            taken = np.sort(self._shuffled(length)[: self.rows_per_sample * count])
            return matrix[taken].reshape(-1, 1, width)
        flat = matrix.reshape(count, length // max(count, 1), width)
        return flat[:, self._chosen(flat.shape[1], flat.shape[1:2])].reshape(-1, 1, width)

    def _is_tokens(self, shape: Shape, counted: Counted, *, transposed: bool) -> bool:
        """Whether an operand certainly is (samples, positions, width).

        Flattened, or with as many samples as positions, it might as well hold the positions first.
        """
        plain = self.form.side == "right" and not (transposed or self.form.batch)
        return plain and shape[:-1] == counted.shape and counted.shape[0] != counted.shape[1]

    def _taken(self, counted: Counted) -> Counted:
        """Of every sample the positions that count, no more than are wanted, in one seeded order for all."""
        order = self._shuffled(counted.shape[1])
        ordered = counted[:, order]
        taken = np.zeros_like(counted)
        taken[:, order] = ordered & (np.cumsum(ordered, axis=1) <= self.rows_per_sample)
        return taken

    def _shuffled(self, count: int) -> NDArray[np.intp]:
        return np.random.default_rng([self.seed, count]).permutation(count)


def _real(array: Values) -> Array:
    return array.astype(np.float64 if array.dtype == np.float64 else np.float32, copy=False)


def _patches(
    x: Array, geometry: Geometry, shape: LayerShape, at: tuple[NDArray[np.intp], ...], out_size: Shape
) -> Array:
    """Receptive fields at output positions `at`, (samples * positions, groups, in * prod(kernel))."""
    kernel, n = shape.kernel, len(shape.kernel)
    pads = _explicit_pads(geometry, kernel, x.shape[2:], out_size)
    padded = np.pad(x, [(0, 0), (0, 0), *pads]) if any(map(any, pads)) else x
    reach = tuple((k - 1) * d + 1 for k, d in zip(kernel, geometry.dilations, strict=True))
    view = sliding_window_view(padded, reach, axis=tuple(range(2, 2 + n)))
    view = view[(..., *(slice(None, None, d) for d in geometry.dilations))]
    corners = tuple(index * stride for index, stride in zip(at, geometry.strides, strict=True))
    picked = view[(slice(None), slice(None), *corners)]  # (samples, channels, positions, *kernel)
    return picked.swapaxes(1, 2).reshape(-1, shape.groups, shape.inputs)


def _explicit_pads(geometry: Geometry, kernel: Shape, size: Shape, out_size: Shape) -> list[tuple[int, int]]:
    n = len(kernel)
    if geometry.auto_pad in {"NOTSET", ""}:
        return [(geometry.pads[i], geometry.pads[i + n]) for i in range(n)]
    if geometry.auto_pad == "VALID":
        return [(0, 0)] * n
    pads: list[tuple[int, int]] = []
    for i in range(n):
        reach = (kernel[i] - 1) * geometry.dilations[i] + 1
        total = max(0, (out_size[i] - 1) * geometry.strides[i] + reach - size[i])
        small = total // 2
        pads.append((small, total - small) if geometry.auto_pad == "SAME_UPPER" else (total - small, small))
    return pads
