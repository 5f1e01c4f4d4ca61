"""The MLP's activations: squared ReLU (arXiv 2109.08668) and SwiGLU (arXiv 2002.05202)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)^2, any shape; backward keeps x alone."""
    if not torch.is_grad_enabled():
        return torch.relu(x).square_()
    return TorchRelu2.apply(x)  # where the device decides


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; the shapes are equal."""
    return F.silu(gate) * up


class TorchRelu2(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.relu(x).square_()

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return torch.relu(x).mul_(dy).mul_(2)
