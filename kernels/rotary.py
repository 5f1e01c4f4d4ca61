"""Rotary positions: channels i and i + D/2 of a head turn by t theta^(-2i/D). Source: arXiv 2104.09864, section 3.2.2;
the pairing of halves is that of the published Llama and Qwen3 checkpoints. Backward is the turn back.

Shapes: [B, T] batch and tokens, [H] heads, [D] head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .norm import working_dtype


def rotary_angles(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine [B, T, 1, D / 2] of the turns at positions [B, T], for `rotary` of tensors of `dtype`.

    float32 (float64 for float64): the published models were trained with angles of that precision.
    Raises ValueError for an odd head_dim.
    """
    if head_dim % 2:
        raise ValueError(f"rotary_angles: head_dim is {head_dim}, expected an even number")
    work = torch.float64 if dtype == torch.float64 else torch.float32
    exponents = torch.arange(0, head_dim, 2, dtype=work, device=positions.device) / head_dim
    angles = positions.unsqueeze(-1).unsqueeze(-1).to(work) * (1.0 / theta**exponents)
    return angles.cos(), angles.sin()


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, H, D] turned by the angles of `rotary_angles`; the answer has x's dtype. Raises ValueError."""
    if x.shape[-1] != 2 * cos.shape[-1] or cos.shape != sin.shape or cos.shape[1] != x.shape[1]:
        raise ValueError(f"rotary: x {tuple(x.shape)}, cos {tuple(cos.shape)} and sin {tuple(sin.shape)} do not fit")
    if not torch.is_grad_enabled():
        return turn(x, cos, sin)
    return TorchRotary.apply(x, cos, sin)  # where the device decides


class TorchRotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return turn(x, cos, sin)

    @staticmethod
    def backward(ctx, dy):
        cos, sin = ctx.saved_tensors
        return turn(dy, cos, -sin), None, None


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.to(working_dtype(x)).chunk(2, -1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1).to(x.dtype)
