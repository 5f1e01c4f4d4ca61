"""`linear` for one row, again and again, on a CPU in float32: views and buffers are made once.

Next to a product that reads its weight at the memory's speed, making views and buffers is a quarter of the time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .linear import linear
from .mamba_step import takes_prepared


class PreparedRow:
    """x [..., K], one row, -> x W^T [..., N] of a weight [N, K] that is stored as `laid_out` does; it holds until the
    next call.

    The weight is read by all threads at once, in parts of its rows in memory. Where those are N's, a part gives some of
    the sums; where they are K's, it gives a share of all of them, and the shares are added up.
    """

    def __init__(self, weight: Tensor, threads: int) -> None:
        self.adds = not weight.is_contiguous()
        stored = weight.mT if self.adds else weight
        rows, self.columns = stored.shape
        self.parts = 2 * threads if rows % (2 * threads) == 0 else threads
        split = stored.view(self.parts, rows // self.parts, self.columns)
        self.matrix = split if self.adds else split.mT
        self.product = weight.new_empty(self.parts, 1, self.matrix.shape[-1])
        self.out = weight.new_empty(1, self.columns) if self.adds else self.product.view(1, rows)
        self.seen: Tensor | None = None

    @staticmethod
    def takes(weight: Tensor, threads: int) -> bool:
        if weight.is_mkldnn or not takes_prepared(weight) or threads == 1:
            return False
        return next((rows.shape[0] % threads == 0 for rows in (weight, weight.mT) if rows.is_contiguous()), False)

    def __call__(self, x: Tensor) -> Tensor:
        if x is not self.seen:  # a buffer of what comes before is the same one every time
            self.seen = x
            self.view = x.view(self.parts, 1, -1) if self.adds else x.view(1, 1, -1).expand(self.parts, 1, self.columns)
            self.answer = self.out.view(*x.shape[:-1], -1)
        torch.bmm(self.view, self.matrix, out=self.product)
        if self.adds:
            torch.sum(self.product, 0, out=self.out)
        return self.answer


def prepared_linear(weight: Tensor, batch: int) -> Callable[[Tensor], Tensor]:
    """`linear` of x [..., K] of `batch` rows with this weight [N, K], for many calls without gradients."""
    threads = torch.get_num_threads()
    if batch == 1 and PreparedRow.takes(weight, threads):
        return PreparedRow(weight, threads)
    return functools.partial(linear, weight=weight)
