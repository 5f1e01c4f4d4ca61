"""What a state that enters from before token 0 adds to an SSD scan that began with an empty one, so that the parts of a
row are scanned side by side. Source: arXiv 2405.21060, section 6, whose chunks are the parts here.

The recurrence is linear in its state: with d_t the decay from the part's start to token t (0 once another document has
begun), a part's answer is y_t + d_t S C_t for an entering state S, and it leaves d_T S + S_T, where y_t and S_T are its
own. Shapes: [n] parts, [B] batch, [T] tokens, [H] heads, [P] head_dim, [G] groups, [N] state.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .tracing import iterations

BLOCK = 4096  # tokens whose share is there at a time


def decay_from_start(
    dt: Tensor,
    A: Tensor,
    continues: Tensor,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> Tensor:
    """Decays [B, T, H] from before token 0 to each token, of dt [B, T, H] and A [H] as `ssd_scan` has them; 0 where
    `continues` [B, T] says that a token is not of the document that was there before token 0. float32 (float64 for
    float64 inputs)."""
    decay: Tensor = DecayFromStart.apply(dt, A, dt_bias, continues, dt_softplus, dt_limit)
    return decay


class DecayFromStart(torch.autograd.Function):
    """Keeps what the scan keeps anyway, and computes the rest again in the backward."""

    @staticmethod
    def forward(ctx, dt, A, dt_bias, continues, dt_softplus, dt_limit):
        ctx.save_for_backward(dt, A, dt_bias, continues)
        ctx.options = dt_softplus, dt_limit
        return decays(dt, A, dt_bias, continues, dt_softplus, dt_limit)

    @staticmethod
    def backward(ctx, ddecay):
        *inputs, continues = ctx.saved_tensors
        with torch.enable_grad():
            leaves: list[Any] = [None if tensor is None else tensor.detach().requires_grad_() for tensor in inputs]
            dt, A, dt_bias = leaves
            decay = decays(dt, A, dt_bias, continues, *ctx.options)
        there = [leaf for leaf in leaves if leaf is not None]
        gradients = iter(torch.autograd.grad(decay, there, ddecay))
        return *[None if leaf is None else next(gradients) for leaf in leaves], None, None, None


def decays(
    dt: Tensor, A: Tensor, dt_bias: Tensor | None, continues: Tensor, dt_softplus: bool, dt_limit: tuple[float, float]
) -> Tensor:
    dtype = torch.float64 if dt.dtype == torch.float64 else torch.float32
    step = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    step = (F.softplus(step) if dt_softplus else step).clamp(*dt_limit)
    # float64, as in the scan: one large step must not blur the small ones of a long sum.
    cumulative = (step.double() * A.double()).cumsum(1)
    return cumulative.to(dtype).exp().masked_fill(~continues.unsqueeze(-1), 0)


def entering_state(states: Tensor, decays: Tensor, part: int) -> Tensor:
    """The state [B, H, P, N] that enters a part, of the states [n, B, H, P, N] that each leaves when it begins with
    none, and its decays from start to end [n, B, H]."""
    entering = states[:0].sum(0)  # zeros, in which autograd sees the states of all: so it does for the first part, too
    for before in range(part):
        entering = torch.addcmul(states[before], entering, decays[before, ..., None, None])
    return entering


def with_entering_state(y: Tensor, C: Tensor, state: Tensor, decay: Tensor) -> Tensor:
    """y [B, T, H, P] of a scan that began with an empty state, and what `state` [B, H, P, N] adds, of C [B, T, G, N]
    and the decays [B, T, H] of `decay_from_start`; in y's dtype, added up in the decays'."""
    whole: Tensor = EnteringState.apply(y, C, state, decay)
    return whole


class EnteringState(torch.autograd.Function):
    """A block of tokens at a time, the products again in the backward."""

    @staticmethod
    def forward(ctx, y, C, state, decay):
        ctx.save_for_backward(C, state, decay)
        whole = torch.empty_like(y)
        for start, stop in blocks(y.shape[1]):
            read = carried(C[:, start:stop], state, decay.dtype)
            whole[:, start:stop] = y[:, start:stop] + read.mul_(decay[:, start:stop, :, None])
        return whole

    @staticmethod
    def backward(ctx, dy):
        C, state, decay = ctx.saved_tensors
        dC, ddecay, dstate = torch.empty_like(C), torch.empty_like(decay), torch.zeros_like(state)
        shape = (state.shape[0], C.shape[2], -1, state.shape[3])  # [B, G, R P, N]
        for start, stop in blocks(dy.shape[1]):
            dblock, of_C = dy[:, start:stop].to(decay.dtype), C[:, start:stop].to(decay.dtype)
            ddecay[:, start:stop] = (carried(of_C, state, decay.dtype).mul_(dblock)).sum(-1)
            dread = (dblock * decay[:, start:stop, :, None]).unflatten(2, (C.shape[2], -1)).flatten(3)  # [B, Q, G, R P]
            dC[:, start:stop] = torch.einsum("bqgk,bgkn->bqgn", dread, state.view(shape).to(decay.dtype))
            dstate += torch.einsum("bqgk,bqgn->bgkn", dread, of_C).reshape(state.shape)
        return dy, dC, dstate, ddecay


def blocks(tokens: int) -> Any:
    return iterations([(start, min(start + BLOCK, tokens)) for start in range(0, tokens, BLOCK)])


def carried(C: Tensor, state: Tensor, dtype: torch.dtype) -> Tensor:
    """S C_t of tokens, [B, Q, H, P]; heads of a group read the same C."""
    grouped = state.to(dtype).unflatten(1, (C.shape[2], -1))  # [B, G, R, P, N]
    return torch.einsum("bgrpn,bqgn->bqgrp", grouped, C.to(dtype)).flatten(2, 3)
