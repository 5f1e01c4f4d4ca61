"""Where the Triton kernels are chosen, found and launched; importing this needs no triton."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .tracing import STATE

CAPABILITIES = (80, 86, 89, 90, 100, 120)  # those that kernels state sizes for; others take the next lower one's


class Launch(NamedTuple):
    """One kernel launch: what `kernel[grid](**arguments, num_warps=, num_stages=)` runs."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int
    stages: int

    def enqueue(self, on: Tensor) -> None:
        """Launches on the device of a tensor."""
        with torch.cuda.device(on.device) if on.is_cuda else contextlib.nullcontext():
            self.kernel[self.grid](**self.arguments, num_warps=self.warps, num_stages=self.stages)


def takes_operator(tensor: Tensor) -> bool:
    """Whether a tensor goes through the operators that torch.library knows: the one place where the device decides. All
    on CUDA do, and on the CPU those that are to go through Triton's interpreter, or stand for a GPU's."""
    return tensor.is_cuda or STATE.gpu or os.environ.get("TRITON_INTERPRET") == "1"


def takes_triton(tensor: Tensor) -> bool:
    """Whether a tensor goes through the Triton kernels: as `takes_operator`, up to float32."""
    return takes_operator(tensor) and tensor.dtype != torch.float64


@functools.cache
def triton_module(name: str) -> Any:
    """The module kernels/NAME.py, written in Triton. Raises ModuleNotFoundError that says what to install."""
    try:
        return importlib.import_module(f".{name}", __package__)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "triton":
            raise
        raise ModuleNotFoundError(
            "limbeck: tensors on a CUDA device need triton, which is not installed: pip install 'triton>=3.6'",
            name="triton",
        ) from None


@functools.cache
def capability(device: torch.device) -> int:
    """The one of CAPABILITIES whose sizes a device takes; the interpreter takes those of 90."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return max((known for known in CAPABILITIES if known <= 10 * major + minor), default=CAPABILITIES[0])


def placed(tensor: Tensor) -> Tensor:
    """A tensor [B, T, ...] whose tiles, of up to 128 tokens and all of the dimensions after them but heads, are
    reached by 32-bit offsets from their corner (whose own are 64 bits wide): a copy only where strides are enormous.
    """
    sizes = (1, min(128, tensor.shape[1]), *(1 for _ in tensor.shape[2:-1]), tensor.shape[-1])
    span = sum((size - 1) * stride for size, stride in zip(sizes, tensor.stride(), strict=True))
    return tensor if span < 2**31 else tensor.contiguous()


def strides(name: str, dimensions: str, tensor: Tensor) -> dict[str, int]:
    """The arguments s_NAME_b, s_NAME_t, ... of a tensor with such dimensions."""
    return {f"s_{name}_{letter}": stride for letter, stride in zip(dimensions, tensor.stride(), strict=True)}


def power_of_two(number: int) -> int:
    """The least power of two that is not below a positive number."""
    return 1 << (number - 1).bit_length()
