"""Rotary positions: channels i and i + D/2 of a head turn by t theta^(-2i/D). Source: arXiv 2104.09864, section 3.2.2;
the pairing of halves is that of the published Llama and Qwen3 checkpoints. Backward is the turn back.

Two ways to stretch them over more tokens than a model was first trained on slow the turns that are slow already: that
of Llama 3.1 (`slowed_llama3`) and YaRN (`slowed_yarn`, arXiv 2309.00071, section 3.2).
Shapes: [B, T] batch and tokens, [H] heads, [D] head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .norm import working_dtype

Slowed = Callable[[Tensor], tuple[Tensor, float]]


def rotary_angles(
    positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype, slowed: Slowed | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine and sine [B, T, 1, D / 2] of the turns at positions [B, T], for `rotary` of tensors of `dtype`.

    float32 (float64 for float64): the published models were trained with angles of that precision. `slowed` gives for
    the turns a token [D / 2] (radians) those of a stretched model, and what cosine and sine are multiplied by.
    Raises ValueError for an odd head_dim.
    """
    if head_dim % 2:
        raise ValueError(f"rotary_angles: head_dim is {head_dim}, expected an even number")
    work = torch.float64 if dtype == torch.float64 else torch.float32
    exponents = torch.arange(0, head_dim, 2, dtype=work, device=positions.device) / head_dim
    turns = 1.0 / theta**exponents
    turns, factor = (turns, 1.0) if slowed is None else slowed(turns)
    angles = positions.unsqueeze(-1).unsqueeze(-1).to(work) * turns
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if factor == 1 else (cos.mul_(factor), sin.mul_(factor))


def slowed_llama3(turns: Tensor, factor: float, low: float, high: float, length: int) -> Tensor:
    """Turns a token [D / 2] of a model that was first trained on `length` tokens: those that go round fewer than `low`
    times in it are slower by `factor`, those beyond `high` times stay, in between both are mixed."""
    rounds = length * turns / (2 * math.pi)
    kept = ((rounds - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * turns / factor + kept * turns


def slowed_yarn(
    turns: Tensor, theta: float, factor: float, fast: float, slow: float, length: int, whole: bool
) -> Tensor:
    """Turns a token [D / 2] of a model that was first trained on `length` tokens: those that go round fewer than `slow`
    times in it are slower by `factor`, those beyond `fast` times stay, in between channel by channel a straight line;
    with `whole` it begins and ends at whole channels."""
    size = 2 * len(turns)

    def channel(rounds: float) -> float:
        """Where a turn goes round so often in `length` tokens (equation 17 solved for the channel)."""
        return size * math.log(length / (rounds * 2 * math.pi)) / (2 * math.log(theta))

    begin, end = channel(fast), channel(slow)
    if whole:
        begin, end = math.floor(begin), math.ceil(end)
    begin, end = max(begin, 0), min(end, size - 1)
    width = end - begin or 0.001  # a line of no length is a step
    mixed = ((torch.arange(len(turns), dtype=turns.dtype, device=turns.device) - begin) / width).clamp(0, 1)
    return turns / factor * mixed + turns * (1 - mixed)


def yarn_attention(factor: float, scale: float = 1.0) -> float:
    """What cosine and sine are multiplied by where nothing else is said, so that attention stays as sharp (eq. 22)."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


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
