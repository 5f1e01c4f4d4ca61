"""RMSNorm, and Mamba-2's gated RMSNorm over groups. Sources: arXiv 1910.07467; arXiv 2405.21060, section 6.

Sums are float32 (float64 for float64 inputs); the answer has the input's dtype. Backward keeps the inputs and one
number a row, and recomputes the rest. Shapes: [C] channels.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from .launch import Launch, power_of_two, takes_triton, triton_module
from .rows import cdiv, flat_rows, multiprocessors

# One configuration on every device: these kernels wait for memory. A program's tile has at least TILE elements and at
# most LARGEST, and the backward has as many programs as put about LARGEST elements on every multiprocessor; while it
# works on one tile the next is on its way (STAGES). Wider groups than LARGEST keep the torch path.
TILE, LARGEST, STAGES = 2048, 8192, 2


def rms_norm(x: Tensor, weight: Tensor, eps: float, n_groups: int = 1) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight inside each of n_groups groups of the last dimension; x [..., C], weight [C].

    Raises ValueError where shapes disagree or the groups do not divide C.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight has shape {tuple(weight.shape)}, expected ({x.shape[-1]},)")
    check_groups(x, n_groups, "rms_norm")
    if takes_triton(x) and x.shape[-1] <= LARGEST * n_groups:
        return norm_op(x, None, weight, eps, n_groups)[0]
    if not torch.is_grad_enabled() and n_groups > 1:
        return normalize(x, None, weight, eps, n_groups)[0]
    if not torch.is_grad_enabled():
        work = working_dtype(x)
        u = x.to(work)
        return (u * inverse_rms(u, eps)).mul_(weight.to(work)).to(x.dtype)
    return TorchNorm.apply(x, None, weight, eps, n_groups)


def add_rms_norm(x: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """The RMSNorm of x [..., C], or of x + added where there is something to add; the sum takes the place of x, and has
    no gradient by Triton. Raises ValueError where shapes disagree."""
    if added is None:
        return rms_norm(x, weight, eps)
    if added.shape != x.shape or weight.shape != x.shape[-1:]:
        shapes = ", ".join(str(tuple(each.shape)) for each in (x, added, weight))
        raise ValueError(
            f"add_rms_norm: x, added and weight have the shapes {shapes}; expected [..., C] twice, and [C]"
        )
    if takes_triton(x) and x.shape[-1] <= LARGEST and x.is_contiguous():
        with torch.no_grad():
            return add_norm_op(x, added, weight, eps)
    return rms_norm(x.add_(added), weight, eps)


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float, n_groups: int) -> Tensor:
    """x * silu(z), then RMSNorm inside each of n_groups groups of channels; x and z [..., C], weight [C].

    Raises ValueError where shapes disagree or the groups do not divide C.
    """
    if weight.shape != x.shape[-1:] or z.shape != x.shape:
        raise ValueError(f"gated_rms_norm: x {tuple(x.shape)}, z {tuple(z.shape)}, weight {tuple(weight.shape)} differ")
    check_groups(x, n_groups, "gated_rms_norm")
    if takes_triton(x) and x.shape[-1] <= LARGEST * n_groups:
        return norm_op(x, z, weight, eps, n_groups)[0]
    if not torch.is_grad_enabled():
        return normalize(x, z, weight, eps, n_groups)[0]
    return TorchNorm.apply(x, z, weight, eps, n_groups)


def check_groups(x: Tensor, n_groups: int, where: str) -> None:
    if n_groups < 1 or x.shape[-1] % n_groups:
        raise ValueError(f"{where}: {x.shape[-1]} channels are not divisible by {n_groups} groups")


class TorchNorm(torch.autograd.Function):
    """Both norms: the plain one is the gated one without a gate."""

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
        dweight = product.reshape(-1, n_groups, size).sum(0).flatten()
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


@torch.library.custom_op("limbeck::norm", mutates_args=())
def norm_op(x: Tensor, z: Tensor | None, weight: Tensor, eps: float, n_groups: int) -> tuple[Tensor, Tensor]:
    """Both norms by Triton: y, and one over the RMS [rows, n_groups]."""
    y, rms = norm_shapes(x, z, weight, eps, n_groups)
    if x.numel():
        forward_launch(x, None, z, weight, eps, y, rms, n_groups).enqueue(x)
    return y, rms


@norm_op.register_fake
def norm_shapes(x: Tensor, z: Tensor | None, weight: Tensor, eps: float, n_groups: int) -> tuple[Tensor, Tensor]:
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    return x.new_empty(x.shape), x.new_empty((rows, n_groups), dtype=torch.float32)


@torch.library.custom_op("limbeck::add_norm", mutates_args=("x",))
def add_norm_op(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> Tensor:
    """add_rms_norm by Triton."""
    y = x.new_empty(x.shape)
    if x.numel():
        forward_launch(x, added, None, weight, eps, y, None, 1).enqueue(x)
    return y


add_norm_op.register_fake(lambda x, added, weight, eps: x.new_empty(x.shape))


@torch.library.custom_op("limbeck::norm_backward", mutates_args=())
def norm_backward_op(
    dy: Tensor, x: Tensor, z: Tensor | None, weight: Tensor, rms: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dz (empty without a gate) and dweight."""
    outputs = norm_backward_shapes(dy, x, z, weight, rms)
    if not x.numel():
        outputs[2].zero_()
        return outputs
    launch, parts = backward_launch(dy, x, z, weight, rms, outputs)
    launch.enqueue(x)
    outputs[2].copy_(parts.sum(0))
    return outputs


@norm_backward_op.register_fake
def norm_backward_shapes(
    dy: Tensor, x: Tensor, z: Tensor | None, weight: Tensor, rms: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if z is None else z.new_empty(z.shape), weight.new_empty(weight.shape)


def keep_for_norm_backward(ctx, inputs, output) -> None:
    x, z, weight, _, _ = inputs
    ctx.save_for_backward(x, z, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for rms, which has no gradient


def backward_of_norm(ctx, dy, _):
    x, z, weight, rms = ctx.saved_tensors
    dx, dz, dweight = norm_backward_op(dy, x, z, weight, rms)
    return dx, None if z is None else dz, dweight, None, None


norm_op.register_autograd(backward_of_norm, setup_context=keep_for_norm_backward)


def forward_launch(
    x: Tensor, added: Tensor | None, z: Tensor | None, weight: Tensor, eps: float, y: Tensor, rms: Tensor | None,
    n_groups: int,
) -> Launch:  # fmt: skip
    """y like x, and rms [rows, n_groups] where it is wanted; x takes what is added to it, and is contiguous then."""
    rows, more, gate = flat_rows(x), None if added is None else flat_rows(added), None if z is None else flat_rows(z)
    count, size = rows.shape[0], rows.shape[1] // n_groups
    tile, block, warps = tile_of(size)
    arguments = {
        "x": rows, "added": more, "z": gate, "weight": weight.contiguous(), "y": y, "rms": rms, "rows": count,
        "eps": eps, "stride_x": rows.stride(0), "stride_added": 0 if more is None else more.stride(0),
        "stride_z": 0 if gate is None else gate.stride(0),
        "SIZE": size, "GROUPS": n_groups, "ROWS": tile, "BLOCK": block, "GATED": z is not None,
    }  # fmt: skip
    return Launch(triton_module("norm_triton").norm_forward, (cdiv(count, tile), n_groups), arguments, warps, 1)


def backward_launch(
    dy: Tensor, x: Tensor, z: Tensor | None, weight: Tensor, rms: Tensor, outputs: tuple[Tensor, Tensor, Tensor]
) -> tuple[Launch, Tensor]:
    """The launch, and where each program leaves its part of dweight [programs, C]: a fixed number of parts, added up
    afterwards, gives the same bits every time."""
    dx, dz, _ = outputs
    count, n_groups = rms.shape
    rows, dout, gate = flat_rows(x), flat_rows(dy), None if z is None else flat_rows(z)
    size = rows.shape[1] // n_groups
    tile, block, warps = tile_of(size)
    programs = backward_programs(count, size, n_groups, multiprocessors(x.device))
    parts = torch.empty((programs, rows.shape[1]), dtype=torch.float32, device=x.device)
    arguments = {
        "dy": dout, "x": rows, "z": gate, "weight": weight.contiguous(), "rms": rms,
        "dx": dx, "dz": None if z is None else dz, "dweight": parts, "rows": count,
        "stride_dy": dout.stride(0), "stride_x": rows.stride(0), "stride_z": 0 if gate is None else gate.stride(0),
        "SIZE": size, "GROUPS": n_groups, "ROWS": tile, "BLOCK": block, "GATED": z is not None, "STAGES": STAGES,
    }  # fmt: skip
    return Launch(triton_module("norm_triton").norm_backward, (programs, n_groups), arguments, warps, STAGES), parts


def tile_of(size: int) -> tuple[int, int, int]:
    """(rows, channels, warps) of the tile that a program holds of groups of `size` channels."""
    block = power_of_two(size)
    rows = max(TILE // block, 1)
    return rows, block, min(rows * block // 256, 16)


def backward_programs(count: int, size: int, n_groups: int, processors: int) -> int:
    """How many programs share the rows of a group in the backward."""
    tile, block, _ = tile_of(size)
    return min(cdiv(count, tile), cdiv(LARGEST // (tile * block) * processors, n_groups))


def backward_workspace(x: Tensor, rms: Tensor, processors: int) -> tuple[int, ...]:
    """Bytes of the parts of dweight that the Triton backward's programs leave (`backward_launch`)."""
    (count, n_groups), channels = rms.shape, x.shape[-1]
    return (4 * channels * backward_programs(count, channels // n_groups, n_groups, processors),)
