"""A Mamba-2 mixer's decoding step between its two projections: `causal_conv1d_step`, `state_update` and
`gated_rms_norm` (or what stands in its place) in one.

By Triton it is one launch (`mamba_step`). On a CPU in float32 a step of a small batch is bounded by the number of
calls, and making a view costs as much as adding a thousand numbers: `PreparedStep` has buffers and views that are made
once. Shapes: [B] batch, [H] heads, [P] head_dim, [G] groups, [R] heads a group, [N] state, [C] channels, [K] conv
width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .activation import swiglu
from .causal_conv1d import causal_conv1d_step
from .launch import takes_operator, takes_triton, triton_module
from .norm import gated_rms_norm, rms_norm
from .state_update import state_update

# What F.softplus and F.silu call; those have no `out`.
softplus_out: Callable[..., Tensor] = torch._C._nn.softplus
silu_out: Callable[..., Tensor] = torch._C._nn.silu


def takes_prepared(*tensors: Tensor) -> bool:
    """Whether real float32 tensors on a CPU are all that there is, and none of them stands for a GPU's."""
    plain = (Tensor, torch.nn.Parameter)
    return all(
        type(t) in plain and t.dtype == torch.float32 and t.device.type == "cpu" and not takes_operator(t)
        for t in tensors
    )


def mamba_step(
    conv: Tensor,
    ssm: Tensor,
    arrived: Tensor,
    z: Tensor,
    conv_in: Tensor,
    dt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor | None,
    limit_low: float,
    limit_high: float,
    eps: float,
    norm_first: bool,
) -> Tensor:
    """What out_proj reads, [B, H P], of one token's z [B, H P], conv_in [B, C] and dt [B, H].

    `conv` [B, C, K-1] and `ssm` [B, H, P, N] are moved on in place; `arrived` [B, G] int32 holds zeros, and does again
    afterwards. conv_weight [C, K], conv_bias [C], A (negative), D and dt_bias [H]; the step is softplus(dt + dt_bias)
    within the limits. y silu(z) is normed in groups with norm_weight [H P], or with `norm_first` y is, and the gate
    comes after it; without a weight there is no norm. By Triton there is no gradient.
    """
    inputs = (conv, ssm, arrived, z, conv_in, dt, conv_weight, conv_bias, A, D, dt_bias, norm_weight)
    options = (limit_low, limit_high, eps, norm_first)
    if not takes_one_launch(conv):
        return separate_step(*inputs, *options)
    with torch.no_grad():
        return mamba_step_op(*inputs, *options)


def takes_one_launch(conv: Tensor) -> bool:
    """Whether the kernel takes a step whose convolution has the state [B, C, K-1]: K is 2, 3 or 4."""
    return takes_triton(conv) and 1 <= conv.shape[2] <= 3


def separate_step(
    conv: Tensor, ssm: Tensor, arrived: Tensor, z: Tensor, conv_in: Tensor, dt: Tensor, conv_weight: Tensor,
    conv_bias: Tensor | None, A: Tensor, D: Tensor, dt_bias: Tensor, norm_weight: Tensor | None, limit_low: float,
    limit_high: float, eps: float, norm_first: bool,
) -> Tensor:  # fmt: skip
    """`mamba_step` by one operator after the other, which takes any device, dtype and width."""
    groups = arrived.shape[1]
    inner, width = z.shape[-1], groups * ssm.shape[3]
    x, B, C = causal_conv1d_step(conv, conv_in, conv_weight, conv_bias).split((inner, width, width), -1)
    x, B, C = x.unflatten(-1, ssm.shape[1:3]), *(each.unflatten(-1, (groups, -1)) for each in (B, C))
    limit = (limit_low, limit_high)
    y = state_update(ssm, x, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=True, dt_limit=limit).flatten(1)
    if norm_weight is None:
        return swiglu(z, y)
    if norm_first:
        return swiglu(z, rms_norm(y, norm_weight, eps, groups))
    return gated_rms_norm(y, z, norm_weight, eps, groups)


@torch.library.custom_op("limbeck::mamba_step", mutates_args=("conv", "ssm", "arrived"))
def mamba_step_op(
    conv: Tensor, ssm: Tensor, arrived: Tensor, z: Tensor, conv_in: Tensor, dt: Tensor, conv_weight: Tensor,
    conv_bias: Tensor | None, A: Tensor, D: Tensor, dt_bias: Tensor, norm_weight: Tensor | None, limit_low: float,
    limit_high: float, eps: float, norm_first: bool,
) -> Tensor:  # fmt: skip
    """CPU tensors go through the Triton kernel in Triton's interpreter, else through torch."""
    if not takes_one_launch(conv):
        return separate_step(conv, ssm, arrived, z, conv_in, dt, conv_weight, conv_bias, A, D, dt_bias, norm_weight,
                             limit_low, limit_high, eps, norm_first)  # fmt: skip
    y = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    if not y.numel():
        return y
    mixed = None if norm_weight is None else torch.empty(y.shape, dtype=torch.float32, device=z.device)
    rows = [each if each.stride(-1) == 1 else each.contiguous() for each in (z, conv_in, dt)]
    vectors = {"bias": conv_bias, "A": A, "D": D, "dt_bias": dt_bias, "norm": norm_weight}
    weights: dict[str, Tensor | None] = {"weight": conv_weight}
    weights |= {name: None if vector is None else vector.contiguous() for name, vector in vectors.items()}
    options = (limit_low, limit_high, eps, norm_first)
    launch = triton_module("mamba_step_triton").step_launch
    launch(conv, ssm, arrived, rows, weights, options, mixed, y).enqueue(z)
    return y


@mamba_step_op.register_fake
def _(conv, ssm, arrived, z, *rest):
    return z.new_empty(z.shape)


def step_workspace(ssm: Tensor, norm_weight: Tensor | None) -> tuple[int, ...]:
    """Bytes of what the programs of `mamba_step` leave for the norm."""
    return () if norm_weight is None else (4 * ssm.shape[:3].numel(),)


class PreparedNorm:
    """RMSNorm over the last dimension of [..., C], in place or into a buffer of its own, which the next call reuses."""

    def __init__(self, shape: tuple[int, ...], eps: float) -> None:
        self.eps, self.share = torch.tensor(eps), 1 / shape[-1]
        self.norm = torch.empty((*shape[:-1], 1))
        self.scale, self.out = torch.empty_like(self.norm), torch.empty(shape)

    def inverse(self, x: Tensor) -> Tensor:
        """1 / sqrt(mean(x^2) + eps) [..., 1]"""
        torch.linalg.vector_norm(x, dim=-1, keepdim=True, out=self.norm)
        return torch.addcmul(self.eps, self.norm, self.norm, value=self.share, out=self.scale).rsqrt_()

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight"""
        return torch.mul(x, self.inverse(x), out=self.out).mul_(weight)


class PreparedStep:
    """Moves the states `conv` [B, C, K-1] (channels innermost) and `ssm` [B, H, P, N] on in place."""

    def __init__(
        self,
        conv: Tensor,
        ssm: Tensor,
        conv_weight: Tensor,
        conv_bias: Tensor | None,
        A: Tensor,
        D: Tensor,
        dt_bias: Tensor,
        dt_limit: tuple[float, float],
        norm_weight: Tensor | None,
        eps: float,
        n_groups: int,
    ) -> None:
        """conv_weight [C, K], A (negative), D and dt_bias [H], norm_weight [H P] (None: the gate
        alone, without a norm)."""
        (batch, heads, head_dim, state), (channels, width) = ssm.shape, conv_weight.shape
        inner, per_group = heads * head_dim, heads // n_groups * head_dim
        self.dt_limit = None if dt_limit == (0.0, math.inf) else dt_limit
        self.dt_bias, self.A, self.D, self.bias, self.norm_weight = dt_bias, A, D[:, None], conv_bias, norm_weight
        self.before, self.kernel = conv.mT, conv_weight.mT.contiguous()  # [B, K-1, C], [K, C]
        self.window, self.product = (torch.empty(batch, width, channels) for _ in range(2))
        self.recent, self.mixed = self.window[:, 1:], torch.empty(batch, 1, channels)
        groups = (batch, n_groups, 1, state)
        x, B, C = self.mixed.split((inner, n_groups * state, n_groups * state), -1)
        self.x, self.B, self.C = x.view(batch, heads, head_dim), B.view(groups), C.view(groups)
        self.step, self.active, self.decay = (torch.empty(batch, 1, heads) for _ in range(3))
        self.active_each, self.decay_each = self.active.mT, self.decay.mT
        self.written = torch.empty(batch, heads, head_dim)
        self.written_group = self.written.view(batch, n_groups, per_group, 1)
        self.decaying = ssm.view(batch, heads, head_dim * state)
        self.growing = ssm.view(batch, n_groups, per_group, state)
        self.read_by = torch.empty(groups)
        self.rows, self.columns = self.read_by.view(-1, 1, state), ssm.view(-1, per_group, state).mT
        self.y = torch.empty(batch * n_groups, 1, per_group)
        self.y_heads, self.y_flat = self.y.view(batch, heads, head_dim), self.y.view(batch, 1, inner)
        self.gated = torch.empty(batch, 1, inner)
        self.grouped = self.gated.view(batch, n_groups, per_group)
        self.norm = PreparedNorm((batch, n_groups, per_group), eps)

    def __call__(self, z: Tensor, conv_in: Tensor, dt: Tensor) -> Tensor:
        """[B, 1, H P] of z [B, 1, H P], conv_in [B, 1, C] and dt [B, 1, H]; it holds until the next call."""
        torch.cat((self.before, conv_in), 1, out=self.window)
        self.before.copy_(self.recent)
        torch.mul(self.window, self.kernel, out=self.product)
        torch.sum(self.product, 1, keepdim=True, out=self.mixed)
        if self.bias is not None:
            self.mixed.add_(self.bias)
        F.silu(self.mixed, inplace=True)
        torch.add(dt, self.dt_bias, out=self.step)
        softplus_out(self.step, out=self.active)
        if self.dt_limit is not None:
            self.active.clamp_(*self.dt_limit)
        torch.mul(self.active, self.A, out=self.decay).exp_()
        torch.mul(self.x, self.active_each, out=self.written)
        self.decaying.mul_(self.decay_each)
        self.growing.addcmul_(self.written_group, self.B)
        self.read_by.copy_(self.C)
        torch.bmm(self.rows, self.columns, out=self.y)
        self.y_heads.addcmul_(self.x, self.D)
        silu_out(z, out=self.gated).mul_(self.y_flat)
        if self.norm_weight is None:
            return self.gated
        self.grouped.mul_(self.norm.inverse(self.grouped))
        return self.gated.mul_(self.norm_weight)
