"""The matrix products of one training step, with nothing between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch

from palcache import PalB
from palcache.tensors import PairBatch

Pair = tuple[torch.Tensor, torch.Tensor]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Products:
    """Matrix products and room for their results.

    Attributes:
        pairs: factors of each product, (..., m, i) and (..., i, n).
        outs: its result, (..., m, n).
    """

    pairs: tuple[Pair, ...]
    outs: tuple[torch.Tensor, ...]

    def run(self) -> None:
        """Multiply."""
        for (left, right), out in zip(self.pairs, self.outs, strict=True):
            torch.matmul(left, right, out=out)

    @property
    def flops(self) -> float:
        """Floating-point operations of all products."""
        return float(sum(2 * left.numel() * right.shape[-1] for left, right in self.pairs))


def products_of_step(shape: PalB, batch: PairBatch) -> Products:
    """Return the products of a step of PAL-B whose projectors have three linear layers, forward and backward.

    The first layers need no gradient of their input, and the k prototypes share theirs, so that theirs is one product.
    """
    pairs = (*_products(shape, batch.responses, copies=()), *_products(shape, batch.prompts, copies=(shape.k,)))
    return Products(pairs, tuple(torch.matmul(left, right) for left, right in pairs))


def _products(shape: PalB, x: torch.Tensor, *, copies: tuple[int, ...]) -> Iterator[Pair]:
    width = shape.p * (copies[0] if copies else 1)
    hidden = x.new_ones(*copies, len(x), shape.p)
    yield x, x.new_ones(width, shape.d).t()
    yield x.new_ones(len(x), width).t(), x
    for _ in range(2):
        weight = x.new_ones(*copies, shape.p, shape.p)
        yield hidden, weight.mT  # the output
        yield hidden, weight  # the gradient of the input
        yield hidden.mT, hidden  # the gradient of the weight
