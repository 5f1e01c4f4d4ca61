"""A matrix product with a weight, x W^T, by the way that is fastest for the number of rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# On CPUs without Intel's favour oneDNN's product is a tenth faster than that of the BLAS of F.linear, and for few rows
# twice as fast; torch reaches it through this operator alone. For one or two rows a batched product of the weight,
# split among the threads, is faster still: it reads the weight at the memory's speed.
ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
# From three rows on, one thread, oneDNN is 1.2 to 1.8 times as fast with weights in its own order, which is a copy.
ONE_OR_TWO = 2


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., K] times weight [N, K] (it may be `packed`) transposed: [..., N]. Differentiable wherever gradients are
    on."""
    if weight.is_mkldnn:  # packed
        assert ONEDNN is not None
        return ONEDNN(x, weight, None, "none", [], "")
    if torch.is_grad_enabled() or x.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32:
        return F.linear(x, weight)
    (rows, columns), parts = weight.shape, torch.get_num_threads()
    straight = weight.is_contiguous()
    if 0 < x.numel() <= ONE_OR_TWO * columns and parts > 1 and rows % parts == 0:
        if straight:
            left = weight.view(parts, rows // parts, columns)
            right = x.reshape(-1, columns).mT.expand(parts, columns, -1)
            return torch.bmm(left, right).view(rows, -1).mT.reshape(*x.shape[:-1], rows)
        if weight.mT.is_contiguous():
            split = weight.mT.view(columns, parts, rows // parts).transpose(0, 1)
            y = torch.bmm(x.reshape(-1, columns).expand(parts, -1, columns), split)
            return y.transpose(0, 1).reshape(*x.shape[:-1], rows)
    if not straight or (parts == 1 and x.numel() <= ONE_OR_TWO * columns):
        return F.linear(x, weight)
    return F.linear(x, weight) if ONEDNN is None else ONEDNN(x, weight, None, "none", [], "")


def laid_out(weight: Tensor) -> Tensor:
    """weight [N, K], stored with its longer dimension innermost: so a CPU reads it fastest for a few rows."""
    return weight.mT.contiguous().mT if weight.shape[0] > weight.shape[1] else weight.contiguous()


def packed(weight: Tensor, rows: int) -> Tensor:
    """weight [N, K] in oneDNN's own order for products with about so many rows, for `linear` alone; the weight itself
    where that is not to be had."""
    if ONEDNN is None or weight.device.type != "cpu" or weight.dtype != torch.float32:
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
