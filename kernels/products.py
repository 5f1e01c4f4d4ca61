"""Products of float32 operands in bfloat16 on a CPU, for processors that have units for it, where that is chosen.

Operands are rounded to bfloat16 and sums are float32. torch's products on a CPU leave these in bfloat16 and in nothing
wider (2.13: their `out_dtype` is CUDA's alone), so that the answer is rounded as well: three roundings of up to 2**-8
of a number in place of two. Everything else stays float32, weights too: they are rounded at every product, which from
FEWEST rows on takes a small part of its time, and are never those from before an optimizer's step.
Shapes: [m] rows, [K] inputs, [N] outputs.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from .linear import linear
from .tracing import STATE

NARROW = torch.bfloat16
FEWEST = 32  # rows; of fewer the rounding of the weight costs what the product gains


@dataclasses.dataclass
class Products:
    """Whether float32 operands are rounded."""

    narrow: bool = False


CHOSEN = Products()


@contextlib.contextmanager
def bfloat16_products(on: bool = True) -> Iterator[None]:
    """Products of projections, experts and the loss's head are in bfloat16 in the block, in all threads, or are not; a
    product's gradients are as it was itself."""
    before, CHOSEN.narrow = CHOSEN.narrow, on
    try:
        yield
    finally:
        CHOSEN.narrow = before


def chosen() -> dict[str, str]:
    """What a stage's options have to say of products: nothing where they are float32, as they always were."""
    return {"matmul": "bfloat16"} if CHOSEN.narrow else {}


def narrows(rows: int, *operands: Tensor) -> bool:
    """Whether a product of so many rows rounds its operands: float32 on a CPU, and not while memory is traced."""
    return (
        CHOSEN.narrow
        and rows >= FEWEST
        and not STATE.on
        and all(each.dtype == torch.float32 and each.device.type == "cpu" for each in operands)
    )


def narrowed(rows: int, *operands: Tensor) -> tuple[Tensor, ...]:
    """Operands of several products of so many rows, rounded once where these round them."""
    return tuple(each.to(NARROW) for each in operands) if narrows(rows, *operands) else operands


def project(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., K] times weight [N, K] transposed: `linear`'s [..., N], by way of bfloat16 where that is chosen."""
    if weight.is_mkldnn or not narrows(x.numel() // max(x.shape[-1], 1), x, weight):
        return linear(x, weight)
    if torch.is_grad_enabled():
        return NarrowProduct.apply(x, weight)
    return (x.flatten(0, -2).to(NARROW) @ weight.to(NARROW).mT).to(x.dtype).view(*x.shape[:-1], -1)


class NarrowProduct(torch.autograd.Function):
    """Backward keeps the rounded rows, half of what a float32 product keeps, and rounds the weight again."""

    @staticmethod
    def forward(ctx, x, weight):
        rows = x.flatten(0, -2).to(NARROW)
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weight)
        return (rows @ weight.to(NARROW).mT).to(x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy):
        rows, weight = ctx.saved_tensors
        dx, dweight, dout = None, None, dy.flatten(0, -2).to(NARROW)
        if ctx.needs_input_grad[0]:
            dx = (dout @ weight.to(NARROW)).to(dy.dtype).view(*dy.shape[:-1], -1)
        if ctx.needs_input_grad[1]:
            dweight = (dout.mT @ rows).to(weight.dtype)
        return dx, dweight
