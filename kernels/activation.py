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
    """silu(gate) * up; the shapes are equal. Backward keeps the two inputs alone."""
    if not torch.is_grad_enabled():
        return F.silu(gate).mul_(up)
    return TorchSwiglu.apply(gate, up)  # where the device decides


class TorchRelu2(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.relu(x).square_()

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return torch.relu(x).mul_(dy).mul_(2)


class TorchSwiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        sigmoid = torch.sigmoid(gate)
        active = gate * sigmoid
        dup = active * dy
        # silu' = sigmoid + silu (1 - sigmoid)
        dgate = torch.addcmul(active, active, sigmoid, value=-1).add_(sigmoid).mul_(up).mul_(dy)
        return dgate, dup
