"""Tensors as rows for the kernels that walk over them, how many programs that takes, and loops of the torch paths."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
SHORTENED = [False]


def iterations(items: Sequence[Item]) -> Sequence[Item]:
    """What a loop over pieces that are alike goes through: all; in `shortened` the first two and the last, which take
    as much memory."""
    return [*items[:2], items[-1]] if SHORTENED[0] and len(items) > 3 else items


@contextlib.contextmanager
def shortened() -> Iterator[None]:
    """Memory is traced, without values: loops are short meanwhile."""
    SHORTENED[0] = True
    try:
        yield
    finally:
        SHORTENED[0] = False


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
