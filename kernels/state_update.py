"""One decoding step of the Mamba-2 state: the recurrence of `ssd`, one token. Source: arXiv 2405.21060, section 3.

Shapes: [B] batch, [H] heads, [P] head_dim, [G] groups, [N] state.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .launch import capability, takes_operator, takes_triton, triton_module


def state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> Tensor:
    """y [B, H, P] of one token; `state` [B, H, P, N] is updated in place.

    x [B, H, P], dt [B, H], A [H] (negative), B and C [B, G, N], D and dt_bias [H]. The arithmetic is float32 (float64
    for float64 inputs); the state may be kept narrower. No gradient. Raises ValueError on wrong shapes.
    """
    batch, heads, head_dim = x.shape
    groups = B.shape[1]
    if groups < 1 or heads % groups:
        raise ValueError(f"state_update: {heads} heads are not divisible by {groups} groups")
    if state.shape != (batch, heads, head_dim, B.shape[2]) or dt.shape != (batch, heads) or B.shape != C.shape:
        raise ValueError(
            f"state_update: shapes disagree: state {tuple(state.shape)}, x {tuple(x.shape)}, dt {tuple(dt.shape)},"
            f" B {tuple(B.shape)}, C {tuple(C.shape)}"
        )
    if takes_operator(x):
        with torch.no_grad():
            return update_op(state, x, dt, A, B, C, D, dt_bias, dt_softplus, *dt_limit)
    return torch_update(state, x, dt, A, B, C, D, dt_bias, dt_softplus, dt_limit)


@torch.no_grad()
def torch_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    dt_softplus: bool, dt_limit: tuple[float, float],
) -> Tensor:  # fmt: skip
    batch, heads, head_dim = x.shape
    groups, width = B.shape[1:]
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    step = dt.to(work) if dt_bias is None else dt.to(work) + dt_bias.to(work)
    if dt_softplus:
        step = F.softplus(step)
    if dt_limit != (0.0, math.inf) or not dt_softplus:
        step = step.clamp(*dt_limit)
    decay = torch.exp(step * A.to(work))  # [B, H]
    x_work = x.to(work)
    grouped = (batch, groups, heads // groups * head_dim)
    kept = state.to(work).view(*grouped, width)  # the state itself where it already is of that dtype
    kept.view(batch, heads, head_dim * width).mul_(decay[..., None])
    written = (x_work * step[..., None]).view(*grouped, 1)
    kept.addcmul_(written, B.to(work)[:, :, None])
    # A row times a matrix: the other way round the product is several times slower.
    rows = C.to(work).reshape(batch * groups, 1, width)
    y = torch.bmm(rows, kept.view(batch * groups, -1, width).mT).view(batch, heads, head_dim)
    if state.dtype != work:
        state.copy_(kept.view_as(state))
    if D is not None:
        y = torch.addcmul(y, x_work, D.to(work)[:, None])
    return y.to(x.dtype)


@torch.library.custom_op("limbeck::state_update", mutates_args=("state",))
def update_op(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    dt_softplus: bool, limit_low: float, limit_high: float,
) -> Tensor:  # fmt: skip
    """CPU tensors go through the Triton kernel in Triton's interpreter, else through torch."""
    if not takes_triton(x):
        return torch_update(state, x, dt, A, B, C, D, dt_bias, dt_softplus, (limit_low, limit_high))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    A, D, dt_bias = (None if tensor is None else tensor.contiguous() for tensor in (A, D, dt_bias))  # type: ignore[assignment]
    options = (dt_softplus, limit_low, limit_high)
    launch = triton_module("state_triton").update_launch
    launch(state, x, dt, A, B, C, D, dt_bias, options, y, capability(x.device)).enqueue(x)
    return y


@update_op.register_fake
def _(state, x, *rest):
    return x.new_empty(x.shape)
