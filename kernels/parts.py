"""Rows cut into parts whose gradients become the rows' without a copy, where they lie side by side.

The gradient of a split is a concatenation: the largest tensor of a layer, written and read once more. A backward that
gives the gradients of all parts (the scan's) lays them out as the parts lay, and then there is nothing to copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .launch import takes_operator


def split_rows(rows: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """rows [..., C] in parts of so many columns, as `Tensor.split`."""
    if not torch.is_grad_enabled() or takes_operator(rows) or torch.compiler.is_compiling():
        return rows.split(sizes, -1)
    return SplitRows.apply(rows, tuple(sizes))


class SplitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, sizes):
        return rows.split(sizes, -1)

    @staticmethod
    def backward(ctx, *gradients):
        whole = joined_rows(gradients)
        return torch.cat(gradients, -1) if whole is None else whole, None


def joined_rows(parts: Sequence[Tensor]) -> Tensor | None:
    """The rows [..., C] that the parts are neighbouring columns of; None where they are not."""
    first, place = parts[0], parts[0].storage_offset()
    for part in parts:
        if (
            part.untyped_storage()._cdata != first.untyped_storage()._cdata  # which tensors without values have, too
            or (part.dtype, part.stride(), part.shape[:-1]) != (first.dtype, first.stride(), first.shape[:-1])
            or part.stride(-1) != 1
            or part.storage_offset() != place
        ):
            return None
        place += part.shape[-1]
    size = place - first.storage_offset()
    if first.dim() > 1 and first.stride(-2) < size:
        return None
    return first.as_strided((*first.shape[:-1], size), first.stride())


def side_by_side(*like: Tensor) -> tuple[Tensor, ...]:
    """Uninitialised tensors [B, T, ...] of the shapes and dtypes of others, in the same rows where these have one
    dtype."""
    if len({tensor.dtype for tensor in like}) > 1:
        return tuple(torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in like)
    sizes = [tensor.shape[2:].numel() for tensor in like]
    rows = torch.empty((*like[0].shape[:2], sum(sizes)), dtype=like[0].dtype, device=like[0].device)
    columns = rows.split(sizes, -1)
    return tuple(part.unflatten(-1, tensor.shape[2:]) for part, tensor in zip(columns, like, strict=True))
