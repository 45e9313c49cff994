"""Least squares over the factors of any chain, in the metric of the outputs.

The dense weight M(f) of a chain is linear in each of its factors, by its einsum equation. `refine` lowers

    tr((M(f) - M) G (M(f) - M)^T),    G = E[c c^T] the second moment of the layer's unfolded input,

by sweeps over the factors: each is replaced by an (approximate) least-squares solution for the others as they are. The
last factor has a closed form where the outputs occur in no other: with T the features that the other stages compute,
the correction solves (T G T^T) X = T G (M - M(f))^T. The others are improved by preconditioned conjugate gradients on
their normal equations, whose matrix is never formed: one product D G per step.

All of it follows from the equation alone: chains of any method are refined alike. Groups are separate problems.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.linalg import LinAlgError, cho_solve

from onnx_lowrank.chain import Chain
from onnx_lowrank.contraction import contract, second_moment, unused
from onnx_lowrank.layer import Array
from onnx_lowrank.linalg import NestedFit, placed_moments, scaled_root

_STEP = 1e-4
_SWEEP = 1e-3
_RIDGE = 1e-6
_OPTIMAL = {np.dtype(np.float32): 3e-6, np.dtype(np.float64): 1e-10}  # a gradient that is rounding error
_DAMPING = {np.dtype(np.float32): 1e-6, np.dtype(np.float64): 1e-8}  # directions without energy stay where they are
_Root = tuple[str, Array, Array]
_SINGLE = 2048  # inputs from which on single precision pays


def working(gram: Array) -> Array:
    """G in the precision that `refine` should work in: large ones in float32, half as large and twice as fast."""
    return gram.astype(np.float32) if gram.shape[-1] >= _SINGLE else gram


def refine(
    chain: Chain, factors: Sequence[Array], weight: Array, gram: Array, *, sweeps: int = 4, iterations: int = 2
) -> tuple[Array, ...]:
    """Better factors of a chain for the outputs; never worse than those given.

    Args:
        chain: Only its equation is used.
        factors: Where to start, one array per stage.
        weight: M as a canonical weight (groups, out, in, *kernel): what the chain stands for.
        gram: G, (groups, n, n), positive semidefinite. In float32 the work is done in float32, twice as fast.
        sweeps: Most sweeps over the stages; fewer when one lowers the squared error by less than 0.1 %.
        iterations: Most steps of conjugate gradients for each stage in each sweep. Few: with the preconditioner two
            steps and one more sweep gain more than twelve steps.

    Returns:
        Factors of the same shapes. The given ones where nothing was gained: second moments that are zero or not finite,
        chains whose factors are shared between the groups of a layer.
    """
    dtype = np.float32 if gram.dtype == np.float32 else np.float64
    subscripts, _ = chain.letters
    group, out, *kept = chain.axes
    shared = not all(group in letters for letters in subscripts)
    if (shared and len(weight) > 1) or not np.isfinite(gram).all() or not all(np.isfinite(f).all() for f in factors):
        return tuple(factors)
    found = [np.array(factor, dtype=dtype) for factor in chain.apart(factors)]
    improved = False
    for index, moment in enumerate(gram):
        own = [_member(array, letters, group, index) for array, letters in zip(found, subscripts, strict=True)]
        problem = _Group([s.replace(group, "") for s in subscripts], out, "".join(kept), own, weight[index], moment)
        try:
            solved = problem.solved(sweeps, iterations)
        except LinAlgError:  # overflow on the way
            continue
        if solved is None:
            continue
        improved = True
        for view, better in zip(own, solved, strict=True):
            view[...] = better.reshape(view.shape)
    return tuple(new.reshape(old.shape) if improved else old for new, old in zip(found, factors, strict=True))


def _member(array: Array, letters: str, group: str, index: int) -> Array:
    """The part of a factor that belongs to one group, as a view."""
    return np.moveaxis(array, letters.index(group), 0)[index] if group in letters else array


class _Group:
    """The factors of one group and their difference from its weight.

    Inputs are ordered (position, F): letters that only the last factor shares with the result, then the others. Axes of
    length one are left out, as einsum multiplies matrices only where no letter stands alone.

    Args:
        subscripts: Letters of each factor, without the group.
        out: Of the outputs; several where they are a product of modes.
        kept: Of input and kernel.
        factors: One array per stage.
        weight: M, (S, C, *kernel).
        gram: G, (n, n).
    """

    def __init__(
        self, subscripts: Sequence[str], out: str, kept: str, factors: Sequence[Array], weight: Array, gram: Array
    ) -> None:
        dtype = factors[0].dtype
        sizes: dict[str, int] = {}
        for letters, factor in zip(subscripts, factors, strict=True):
            sizes.update(zip(letters, factor.shape, strict=True))
        self.out, self.sizes = out, {x: n for x, n in sizes.items() if n > 1 or x in out}
        self.subscripts = [self._long(letters) for letters in subscripts]
        shapes = [[sizes[x] for x in letters] for letters in self.subscripts]
        self.factors: list[Array] = [factor.reshape(shape) for factor, shape in zip(factors, shapes, strict=True)]
        earlier, last = set("".join(self.subscripts[:-1])), self.subscripts[-1]
        kept = self._long(kept)
        self.positions = "".join(x for x in kept if x in last and x not in earlier)
        self.inputs = "".join(x for x in kept if x not in self.positions)
        self.closed = len(out) == 1 and out in last and out not in earlier
        index = np.arange(len(gram)).reshape([self.sizes[x] for x in kept])
        order = index.transpose([kept.index(x) for x in self.positions + self.inputs]).ravel()
        self.weight = weight.reshape(len(weight), -1)[:, order].astype(dtype)
        self.gram = gram.astype(dtype, copy=False)
        if not np.array_equal(order, index.ravel()):
            self.gram = self.gram[np.ix_(order, order)]

    def _long(self, letters: str) -> str:
        return "".join(letter for letter in letters if letter in self.sizes)

    def solved(self, sweeps: int, iterations: int) -> list[Array] | None:
        """The factors after at most `sweeps` sweeps, or None if that gained nothing."""
        product = self._difference() @ self.gram
        first = before = self._objective(product)
        for _ in range(sweeps):
            product = self._improve_inner(product, iterations, before)
            if self.closed:
                product = self._correct_last(product)
            after = self._objective(product)
            if not after < before * (1 - _SWEEP):
                break
            before = after
        # What is added up drifts; what is returned is judged afresh.
        better = self._objective(self._difference() @ self.gram) < first
        return self.factors if better and all(np.isfinite(f).all() for f in self.factors) else None

    def _improve_inner(self, product: Array, iterations: int, objective: float) -> Array:
        """Conjugate gradients on every factor but a last one in closed form; `product` is D G, and so is what returns.

        With that last factor A = Q R, the work is done on the rows of Q^T M: the rest of M is out of the others' reach.
        """
        factors, basis = list(self.factors), None
        if self.closed:
            axis = self.subscripts[-1].index(self.out)
            last = np.moveaxis(factors[-1], axis, 0)
            matrix = last.reshape(len(self.weight), -1)
            if matrix.shape[0] > matrix.shape[1]:
                basis, small = np.linalg.qr(matrix)
                factors[-1] = np.moveaxis(small.reshape(-1, *last.shape[1:]), 0, axis)
        level = float(np.linalg.norm(product))
        reduced = start = product if basis is None else basis.T @ product
        for i in range(len(factors) - self.closed):
            normal = _Normal(self, factors, i, len(reduced))
            step, change, gain = normal.solve(reduced, iterations, objective, level)
            factors[i] = self.factors[i] = factors[i] + step
            reduced, objective = reduced + change, objective - gain
        return reduced if basis is None else product + basis @ (reduced - start)

    def _correct_last(self, product: Array) -> Array:
        """Least squares for the last factor; `product` is D G, and so is what returns."""
        letters = self.subscripts[-1]
        rest = [x for x in letters if x != self.out and x not in self.positions]
        fresh = unused(self.sizes)
        names = {x: next(fresh) if x in self.inputs else x for x in rest}
        terms = list(zip(self.subscripts[:-1], self.factors[:-1], strict=True))
        terms += [(x + new, np.eye(self.sizes[x], dtype=product.dtype)) for x, new in names.items() if x != new]
        sizes = {**self.sizes, **{new: self.sizes[x] for x, new in names.items()}}
        inputs = math.prod(self.sizes[x] for x in self.inputs)
        rows = contract(terms, "".join(names.values()) + self.inputs, sizes).reshape(-1, inputs)
        half, moment, cross = placed_moments(rows.astype(product.dtype), self.gram, -product)
        fit = NestedFit(moment.astype(np.float64), cross.astype(np.float64), _DAMPING[product.dtype])
        solution = fit.solve(len(moment)).astype(product.dtype)
        order = "".join(rest) + self.positions + self.out
        change = solution.reshape([self.sizes[x] for x in order])
        self.factors[-1] = self.factors[-1] + change.transpose([order.index(x) for x in letters])
        by_position = solution.reshape(len(rows), -1, len(product)).swapaxes(0, 1).reshape(len(moment), -1)
        return product + by_position.T @ half.reshape(len(moment), -1)

    def average(self, letters: str) -> Array:
        """G over the inputs named by `letters`, averaged over the others; matrix (size, size)."""
        kept, fresh = self.positions + self.inputs, unused(self.sizes)
        if letters == kept:
            return self.gram
        primed = {x: next(fresh) if x in letters else x for x in kept}
        shape = [self.sizes[x] for x in kept]
        size = math.prod(self.sizes[x] for x in letters)
        equation = kept + "".join(primed.values()) + "->" + letters + "".join(primed[x] for x in letters)
        return np.einsum(equation, self.gram.reshape(shape * 2)).reshape(size, size) * (size / len(self.gram))

    def _difference(self) -> Array:
        terms = list(zip(self.subscripts, self.factors, strict=True))
        dense = contract(terms, self.out + self.positions + self.inputs, self.sizes)
        return dense.reshape(-1, len(self.gram)) - self.weight

    def _objective(self, product: Array) -> float:
        return float(np.vdot(self._difference(), product))


class _Normal:
    """The normal equations of one factor X, the others held: J^T J X = -J^T D with J linear in X, in the metric G.

    The preconditioner is the Kronecker product of small matrices: the average of G over the inputs that X sees itself,
    and for each letter that X shares with other factors their second moment along it.

    Args:
        group: The problem.
        factors: All factors; the last may have fewer outputs than the problem.
        i: Which one is X.
        outputs: Number of outputs.
    """

    def __init__(self, group: _Group, factors: Sequence[Array], i: int, outputs: int) -> None:
        self.group, self.letters = group, group.subscripts[i]
        self.sizes = {**group.sizes, group.out: outputs} if group.closed else group.sizes
        self.kept = group.positions + group.inputs
        pairs = enumerate(zip(group.subscripts, factors, strict=True))
        self.others = [pair for j, pair in pairs if j != i]
        self.shape, self.dtype = factors[i].shape, factors[i].dtype

    def solve(self, product: Array, steps: int, objective: float, level: float) -> tuple[Array, Array, float]:
        """The step of X, the change of D G, and by how much the objective falls; `level` is the length of all D G."""
        step, change, gained = np.zeros(self.shape, self.dtype), np.zeros_like(product), 0.0
        residual = -self._adjoint(product)
        reach = math.prod(float(np.linalg.norm(array)) for _, array in self.others)
        if np.linalg.norm(residual) <= _OPTIMAL[self.dtype] * reach * level:
            return step, change, gained
        roots = self._preconditioner()
        direction = condition = self._conditioned(residual, roots)
        slope = float(np.vdot(residual, condition))
        for _ in range(steps):
            moved = self._apply(direction)
            image = moved @ self.group.gram
            curvature = float(np.vdot(moved, image))
            if not (curvature > 0 and slope > 0):
                break
            length = slope / curvature
            step += length * direction
            change += length * image
            gained += length * slope
            if length * slope < _STEP * (objective - gained):
                break
            residual = residual - length * self._adjoint(image)
            condition = self._conditioned(residual, roots)
            slope, previous = float(np.vdot(residual, condition)), slope
            direction = condition + (slope / previous) * direction
        return step, change, gained

    def _apply(self, x: Array) -> Array:
        dense = contract([*self.others, (self.letters, x)], self.group.out + self.kept, self.sizes)
        return dense.reshape(-1, len(self.group.gram)).astype(self.dtype, copy=False)

    def _adjoint(self, dense: Array) -> Array:
        letters = self.group.out + self.kept
        term = (letters, dense.reshape([self.sizes[x] for x in letters]))
        return contract([*self.others, term], self.letters, self.sizes).astype(self.dtype, copy=False)

    def _preconditioner(self) -> list[_Root]:
        own = "".join(x for x in self.letters if x in self.kept)
        found = [(own, self.group.average(own))] if own else []
        elsewhere = {x for letters, _ in self.others for x in letters}
        theirs = "".join(x for x in self.kept if x in elsewhere)
        moment = self.group.average(theirs).reshape([self.sizes[x] for x in theirs] * 2)
        for letter in self.letters:
            if letter in self.kept or letter in self.group.out or letter not in elsewhere:
                continue
            tied = (set(self.letters) - {letter} - set(theirs)) | set(self.group.out)
            found.append((letter, second_moment(self.others, letter, tied, theirs, moment, self.sizes)))
        roots: list[_Root] = []
        for letters, matrix in found:
            lower, scale = scaled_root(matrix.astype(np.float64), _RIDGE)
            roots.append((letters, lower.astype(self.dtype), scale.astype(self.dtype)))
        return roots

    def _conditioned(self, x: Array, roots: Sequence[_Root]) -> Array:
        for letters, lower, scale in roots:
            order = [self.letters.index(a) for a in letters]
            order += [a for a in range(x.ndim) if a not in order]
            moved = x.transpose(order)
            matrix = moved.reshape(len(lower), -1) * scale[:, None]
            matrix = cho_solve((lower, True), matrix, check_finite=False) * scale[:, None]
            x = matrix.reshape(moved.shape).transpose(np.argsort(order))
        return x
