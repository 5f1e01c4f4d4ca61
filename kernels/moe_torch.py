"""Products over groups of rows (moe.py) in torch: group after group on a CPU, by torch's grouped product on some GPUs.

Shapes: [m] rows, [E] groups, `ends` [E] (int32) where each ends; [N] outputs, [K] inputs of a group's matrix.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from .linear import linear
from .products import NARROW, narrows

MANY = 16  # rows from which on `linear`'s way is faster than it costs to copy its answer
# Compute capabilities on which torch's grouped product is one kernel (ATen/native/cuda/GroupedBlas.cpp).
# Elsewhere it copies `ends` to the host and loops over groups, which a CUDA graph cannot capture.
WHOLE = ((9, 0), (10, 0))
ALIGNED = 8  # numbers of bfloat16 that torch's grouped product wants rows to be multiples of: 16 bytes


def groups_of_rows(ends: Tensor) -> Iterator[tuple[int, int, int]]:
    """(group, first row, end) of the groups that have rows; the only look at where they end from the host."""
    start = 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            yield group, start, end
        start = end


@torch.no_grad()
def segment_product(x: Tensor, weight: Tensor, ends: Tensor, turned: bool) -> Tensor:
    """`moe.grouped_product`, group after group; a group without rows is not read."""
    if ends.numel() and int(ends[-1]) != len(x):
        raise ValueError(f"grouped_product: {len(x)} rows, of which groups 0..{len(ends) - 1} have {int(ends[-1])}")
    y = x.new_empty(len(x), weight.shape[2 if turned else 1])
    rounded = x.to(NARROW) if narrows(len(x), x, weight) else None
    for group, start, end in groups_of_rows(ends):
        matrix = weight[group] if turned else weight[group].mT
        if rounded is not None and narrows(end - start, x):
            y[start:end] = rounded[start:end] @ matrix.to(NARROW)
        elif turned or end - start < MANY:
            torch.mm(x[start:end], matrix, out=y[start:end])
        else:
            y[start:end] = linear(x[start:end], weight[group])
    return y


def segment_gradient(y: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """`moe.grouped_gradient`, group after group."""
    gradient = x.new_zeros(len(ends), y.shape[1], x.shape[1])
    rounded = (y.to(NARROW), x.to(NARROW)) if narrows(len(x), y, x) else None
    for group, start, end in groups_of_rows(ends):
        if rounded is not None and narrows(end - start, x):
            gradient[group] = rounded[0][start:end].mT @ rounded[1][start:end]
        else:
            torch.mm(y[start:end].mT, x[start:end], out=gradient[group])
    return gradient


def takes_torch_grouped(*operands: Tensor) -> bool:
    """Whether torch's grouped product takes these without a look at them from the host: bfloat16 on a GPU of WHOLE,
    aligned."""
    if not operands[0].is_cuda or not hasattr(F, "grouped_mm"):
        return False
    if torch.cuda.get_device_capability(operands[0].device) not in WHOLE:
        return False
    return all(
        tensor.dtype == torch.bfloat16
        and tensor.is_contiguous()
        and not any(size % ALIGNED for size in tensor.shape[1:])
        for tensor in operands
    )


def torch_product(x: Tensor, weight: Tensor, ends: Tensor, turned: bool) -> Tensor:
    """`moe.grouped_product` by torch's."""
    return F.grouped_mm(x, weight if turned else weight.mT, offs=ends)


def torch_gradient(y: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """`moe.grouped_gradient` by torch's: groups lie along the dimension that is summed over."""
    gradient = F.grouped_mm(y.mT, x, offs=ends)
    # On compute capability 10.0 torch leaves what was in memory where a group has no rows (pytorch#172439): it is put
    # aside, and in place, as a product with zero would keep NaN and another stack would be as large as the weights.
    empty = ends == F.pad(ends[:-1], (1, 0))
    return gradient.masked_fill_(empty[:, None, None], 0)
