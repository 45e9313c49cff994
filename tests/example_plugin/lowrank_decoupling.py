"""Network decoupling (Guo et al., BMVC 2018): a 1x1 convolution C->r S, then r kxk filters on each of S channels."""

from dataclasses import dataclass
from math import prod

import numpy as np

from onnx_lowrank.chain import Chain, Stage
from onnx_lowrank.decomposition import Decomposition, Factorization


class Filters(Factorization):
    """The filter of every output channel, a matrix C x taps, cut by an SVD of its own."""

    def __init__(self, weight):
        _, out, in_, *self.kernel = weight.shape
        self.u, self.sigma, self.v = np.linalg.svd(weight.reshape(out, in_, -1), full_matrices=False)
        self.norm = np.linalg.norm(weight) or 1.0

    def error(self, rank):
        return float(np.linalg.norm(self.sigma[:, rank[0] :]) / self.norm)

    def factors(self, rank):
        (r,), (out, in_, _) = rank, self.u.shape
        first = (self.u * self.sigma[:, None])[:, :, :r].swapaxes(1, 2).reshape(1, out * r, in_, 1, 1)
        return first, self.v[:, :r].reshape(out, 1, r, *self.kernel)


@dataclass(frozen=True)
class Decoupling(Decomposition):
    """Network decoupling: 1x1 C->r S, r kxk filters on each of S channels."""

    name = "decoupling"

    def refusal(self, shape):
        fits = len(shape.kernel) == 2 and not shape.is_matrix and shape.groups == 1
        return None if fits else f"{shape} is no two-dimensional convolution of one group"

    def exact_rank(self, shape):
        return (min(shape.in_, prod(shape.kernel)),)

    def ranks(self, shape, block):
        found = [(r,) for r in range(1, self.exact_rank(shape)[0])]
        return [rank for rank in found if self.chain(shape, rank).params < shape.params]

    def chain(self, shape, rank):
        first = Stage(1, shape.out * rank[0], shape.in_, (1, 1))
        last = Stage(shape.out, 1, rank[0], shape.kernel, carries=(0, 1))
        return Chain(self.name, (first, last), "g(sr)cxy,(gs)orhw->gschw")

    def factorize(self, weight, gram=None, *, most=None):
        return Filters(weight)
