"""Tensors as rows for the kernels that walk over them, and how many programs that takes."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def flat_rows(x: Tensor) -> Tensor:
    """x [..., C] as [rows, C] with neighbouring columns side by side: a view wherever strides allow it."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def cdiv(size: int, part: int) -> int:
    """How many parts cover the size."""
    return -(-size // part)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many of them a CUDA device has; 2 for any other device, so that the interpreter sees several programs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
