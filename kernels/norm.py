"""RMSNorm, and Mamba-2's gated RMSNorm over groups. Sources: arXiv 1910.07467; arXiv 2405.21060, section 6.

Sums are float32 (float64 for float64 inputs); the answer has the input's dtype. Backward keeps the inputs and one
number a row, and recomputes the rest.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; x [..., C], weight [C]. Raises ValueError."""
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight has shape {tuple(weight.shape)}, expected ({x.shape[-1]},)")
    if not torch.is_grad_enabled():
        work = working_dtype(x)
        u = x.to(work)
        return (u * inverse_rms(u, eps)).mul_(weight.to(work)).to(x.dtype)
    return TorchNorm.apply(x, None, weight, eps, 1)  # where the device decides


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float, n_groups: int) -> Tensor:
    """x * silu(z), then RMSNorm inside each of n_groups groups of channels; x and z [..., C], weight [C].

    Raises ValueError where shapes disagree or the groups do not divide C.
    """
    if weight.shape != x.shape[-1:] or z.shape != x.shape:
        raise ValueError(f"gated_rms_norm: x {tuple(x.shape)}, z {tuple(z.shape)}, weight {tuple(weight.shape)} differ")
    if n_groups < 1 or x.shape[-1] % n_groups:
        raise ValueError(f"gated_rms_norm: {x.shape[-1]} channels are not divisible by {n_groups} groups")
    if not torch.is_grad_enabled():
        return normalize(x, z, weight, eps, n_groups)[0]
    return TorchNorm.apply(x, z, weight, eps, n_groups)  # where the device decides


class TorchNorm(torch.autograd.Function):
    """Both norms: the plain one is the gated one without a gate, in one group."""

    @staticmethod
    def forward(ctx, x, z, weight, eps, n_groups):
        y, rms = normalize(x, z, weight, eps, n_groups)
        ctx.save_for_backward(x, z, weight, rms)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, z, weight, rms = ctx.saved_tensors
        work = rms.dtype
        n_groups = rms.shape[-2]
        gate = None if z is None else F.silu(z.to(work))
        u = x.to(work) if gate is None else x.to(work) * gate
        grouped = u.unflatten(-1, (n_groups, -1))
        size = grouped.shape[-1]
        normed = grouped * rms
        dy = dy.to(work).unflatten(-1, (n_groups, size))
        product = dy * normed
        dweight = product.flatten(0, -3).sum(0).flatten()
        scale = weight.to(work).view(n_groups, size)
        mean = torch.linalg.vecdot(product, scale)[..., None]
        du = torch.mul(dy, scale, out=product).addcmul_(normed, mean, value=-1 / size).mul_(rms).flatten(-2)
        if gate is None:
            return du.to(x.dtype), None, dweight.to(weight.dtype), None, None
        sigmoid = torch.sigmoid(z.to(work))
        # silu' = sigmoid + silu (1 - sigmoid)
        slope = torch.addcmul(gate, gate, sigmoid, value=-1).add_(sigmoid)
        dz = slope.mul_(x.to(work)).mul_(du)
        return du.mul_(gate).to(x.dtype), dz.to(z.dtype), dweight.to(weight.dtype), None, None


def normalize(x: Tensor, z: Tensor | None, weight: Tensor, eps: float, n_groups: int) -> tuple[Tensor, Tensor]:
    """The normed rows [..., C], and one over the root mean square of each group [..., n_groups, 1]."""
    work = working_dtype(x)
    u = x.to(work) if z is None else F.silu(z.to(work)).mul_(x)
    size = u.shape[-1] // n_groups
    grouped = u.view(*u.shape[:-1], n_groups, size) if u.is_contiguous() else u.unflatten(-1, (n_groups, size))
    rms = inverse_rms(grouped, eps)
    y = grouped * rms if u is x else grouped.mul_(rms)
    return y.mul_(weight.to(work).view(n_groups, size)).flatten(-2).to(x.dtype), rms


def inverse_rms(u: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(u^2) + eps) over the last dimension, which stays as 1."""
    # A norm reads the row once; a square and a mean would write and read it again.
    norm = torch.linalg.vector_norm(u, dim=-1, keepdim=True)
    if u.device.type == "cpu" and type(u) is Tensor:  # in decoding every call counts; a fake tensor is no Tensor here
        return torch.addcmul(constant(eps, u.dtype), norm, norm, value=1 / u.shape[-1]).rsqrt_()
    return norm.square_().mul_(1 / u.shape[-1]).add_(eps).rsqrt_()


@functools.lru_cache(maxsize=64)
def constant(value: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(value, dtype=dtype)


def working_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
