"""Nodes of chains with folded stages: channels are cut into modes, some of which count as batch meanwhile.

Convolutions: the shared modes, the major ones, join the batch by Reshape to (-1, inputs, 0, 0) and leave it by Reshape
to (-1, channels, 0, 0), so that batch and spatial sizes stay dynamic. Where modes change places, Gather permutes whole
channels: behind a Transpose no Reshape could tell several unknown sizes apart.

Gemm and MatMul: rows x channels, whatever the rank of the activation; Reshape to (-1, *modes), Transpose, Reshape to
(-1, inputs) and MatMul, stage by stage. The leading sizes come back from the activation's own shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from onnx import NodeProto, helper

from onnx_lowrank.chain import Chain, Folded, Stage
from onnx_lowrank.graph.tensor import make_tensor
from onnx_lowrank.layer import Array, Form, Shape

_INT64 = np.int64
_END = np.iinfo(_INT64).max


def has_folds(chain: Chain) -> bool:
    """Whether some stage is folded. Of a matrix, all stages are then, and `in` and `out` are those of `x F^T`."""
    return any(isinstance(stage, Folded) for stage in chain.stages)


def folded_tensor(form: Form, stage: Folded, factor: Array) -> Array:
    """A folded stage's weight (1, *outs, *inputs, *kernel) as its node wants it."""
    if form.op == "Conv":
        return factor.reshape(stage.out, stage.in_, *stage.kernel)
    return factor.reshape(stage.out, stage.in_).T


def convolution_attributes(form: Form, stage: Stage) -> dict[str, object]:
    """Attributes of a stage's Conv: stride, dilation and pads on the axes that it carries.

    Raises:
        ValueError: for a form that was not read from a Conv.
    """
    if form.geometry is None:
        raise ValueError("got a Conv without geometry; expected the form of a layer that was read from a graph")
    own = form.geometry.restricted(stage.carries)
    padding: dict[str, object] = {"pads": list(own.pads)} if own.auto_pad == "NOTSET" else {"auto_pad": own.auto_pad}
    return {
        "dilations": list(own.dilations),
        "group": stage.groups,
        "kernel_shape": list(stage.kernel),
        **padding,
        "strides": list(own.strides),
    }


def lower_folded(
    form: Form, chain: Chain, prefix: str, x: str, y: str, bias: str | None, weights: Sequence[str]
) -> list[NodeProto]:
    """The nodes of a chain with folded stages, in order, named `prefix_0`, `prefix_1`, ...; constants go unnumbered.

    Args: as for `rewrite.lower`.
    """
    nodes = _Nodes(prefix, form)
    if form.op == "Conv":
        _convolutions(nodes, chain, x, bias, weights)
    else:
        _products(nodes, chain, x, bias, weights)
    nodes.made[-1].output[0] = y
    return nodes.made


class _Nodes:
    """Nodes in the making.

    Args:
        prefix: Start of their names.
        form: The node that they replace.
    """

    def __init__(self, prefix: str, form: Form) -> None:
        self.prefix, self.form = prefix, form
        self.made: list[NodeProto] = []
        self._numbered = 0

    def add(self, op: str, *inputs: str, **attributes: object) -> str:
        """One more node; the name of what it makes."""
        name = f"{self.prefix}_{self._numbered}"
        self._numbered += 1
        node = helper.make_node(op, inputs, [f"{name}/out"], name=name)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        self.made.append(node)
        return f"{name}/out"

    def constant(self, array: Array | Sequence[int], elem_type: int | None = None) -> str:
        """A constant: integers, or floats of `elem_type`."""
        name = f"{self.prefix}_{self._numbered}/constant{len(self.made)}"
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(_INT64)) if elem_type is None else elem_type
        value = make_tensor(name, np.asarray(array, _INT64 if elem_type is None else np.float32), kind)
        self.made.append(helper.make_node("Constant", [], [name], name=name, value=value))
        return name

    def reshaped(self, x: str, shape: Iterable[int]) -> str:
        """The tensor reshaped; 0 keeps a size, -1 is what remains."""
        return self.add("Reshape", x, self.constant(tuple(shape)))

    def permuted_channels(self, x: str, modes: Shape, order: Shape) -> str:
        """The tensor with its channels, cut into modes, in another order."""
        if not _moves(order):
            return x
        index = np.arange(math.prod(modes)).reshape(modes).transpose(order).ravel()
        return self.add("Gather", x, self.constant(index.tolist()), axis=1)

    def permuted_columns(self, x: str, modes: Shape, order: Shape) -> str:
        """The same for rows x channels: rows x modes in order."""
        x = self.reshaped(x, (-1, *modes))
        return self.add("Transpose", x, perm=[0, *(1 + axis for axis in order)])

    def sizes(self, x: str, start: int, end: int = _END) -> str:
        """Part of the shape of a tensor."""
        return self.part(self.add("Shape", x), start, end)

    def part(self, vector: str, start: int, end: int = _END) -> str:
        """Some entries of a vector, as Python slices."""
        if self.form.opset < 10:
            return self.add("Slice", vector, axes=[0], starts=[start], ends=[end])
        return self.add("Slice", vector, *(self.constant([value]) for value in (start, end, 0)))

    def columns(self, x: str) -> tuple[str, str]:
        """Size of the last axis of what W x multiplies: nothing and 1 of a vector, which has no such axis."""
        present = self.part(self.sizes(x, 1), -1)
        return present, self.part(self.add("Concat", present, self.constant([1]), axis=0), 0, 1)

    def shaped(self, x: str, *parts: str | int) -> str:
        """The tensor reshaped to parts of shapes and numbers side by side."""
        pieces = [self.constant([part]) if isinstance(part, int) else part for part in parts]
        return self.add("Reshape", x, self.add("Concat", *pieces, axis=0))


def _convolutions(nodes: _Nodes, chain: Chain, x: str, bias: str | None, weights: Sequence[str]) -> None:
    still, last = (0,) * len(chain.stages[0].kernel), chain.stages[-1]
    late = last.copies > 1 or (isinstance(last, Folded) and _moves(last.leaves))
    for i, (stage, weight) in enumerate(zip(chain.stages, weights, strict=True)):
        fold = stage if isinstance(stage, Folded) else None
        if fold:
            x = nodes.permuted_channels(x, fold.modes, fold.order)
        if stage.copies > 1:
            x = nodes.reshaped(x, (-1, stage.in_, *still))
        inside = bias if i == len(chain.stages) - 1 and not late else None
        x = nodes.add("Conv", x, weight, *([inside] if inside else []), **convolution_attributes(nodes.form, stage))
        if stage.copies > 1:
            x = nodes.reshaped(x, (-1, stage.copies * stage.out, *still))
        if fold:
            x = nodes.permuted_channels(x, fold.left, fold.leaves)
    if bias and late:
        nodes.add("Add", x, nodes.reshaped(bias, (-1, *(1 for _ in still))))


def _products(nodes: _Nodes, chain: Chain, x: str, bias: str | None, weights: Sequence[str]) -> None:
    form, source, columns = nodes.form, x, 0
    if form.op == "Gemm" and form.transposed_input != (form.side == "left"):
        x = nodes.add("Transpose", x, perm=[1, 0])
    elif form.op == "MatMul" and form.side == "left":
        _, width = nodes.columns(source)
        first = chain.stages[0]
        x = nodes.shaped(x, -1, first.in_ * first.copies, width)
        x = nodes.add("Transpose", x, perm=[0, 2, 1])
    for stage, weight in zip(chain.stages, weights, strict=True):
        if not isinstance(stage, Folded):
            raise TypeError(f"got {stage} in a folded chain of a matrix; expected folded stages only")
        if _moves(stage.order):
            x, columns = nodes.permuted_columns(x, stage.modes, stage.order), 0
        if columns != stage.in_:
            x = nodes.reshaped(x, (-1, stage.in_))
        x, columns = nodes.add("MatMul", x, weight), stage.out
        if _moves(stage.leaves):
            x, columns = nodes.permuted_columns(x, stage.left, stage.leaves), 0
    last = chain.stages[-1]
    _restored(nodes, source, x, last.copies * last.out)
    if bias is not None:
        _biased(nodes, bias)


def _restored(nodes: _Nodes, source: str, x: str, out: int) -> None:
    """Give rows x channels the leading sizes of the activation again, and the weight's own axes of length 1."""
    form = nodes.form
    if form.op == "Gemm":
        x = nodes.reshaped(x, (-1, out))
        if form.side == "left":
            nodes.add("Transpose", x, perm=[1, 0])
        return
    if form.side == "right":
        x = nodes.shaped(x, nodes.sizes(source, 0, -1), out)
    else:
        present, width = nodes.columns(source)
        x = nodes.add("Transpose", nodes.shaped(x, -1, width, out), perm=[0, 2, 1])
        x = nodes.shaped(x, nodes.sizes(source, 0, -2), out, present)
    if form.batch:
        nodes.add("Mul", x, nodes.constant(np.ones((*form.batch, 1, 1)), form.elem_type))


def _biased(nodes: _Nodes, bias: str) -> None:
    """Add Gemm's C, beta times."""
    y = nodes.made[-1].output[0]
    if nodes.form.beta != 1.0:
        bias = nodes.add("Mul", bias, nodes.constant(np.array([nodes.form.beta]), nodes.form.elem_type))
    nodes.add("Add", y, bias)


def _moves(order: Shape) -> bool:
    return order != tuple(range(len(order)))
