"""The MLP's activations: squared ReLU (arXiv 2109.08668) and SwiGLU (arXiv 2002.05202)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .launch import Launch, takes_triton, triton_module
from .rows import cdiv

BLOCK, WARPS = 2048, 4  # on every device: 16 elements a thread, two 16-byte reads of bfloat16


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)^2, any shape; backward keeps x alone."""
    if takes_triton(x):
        return relu2_op(x)
    if not torch.is_grad_enabled():
        active = torch.relu(x)
        return active.mul_(active)  # square_ goes through pow, and takes three times as long
    return TorchRelu2.apply(x)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; the shapes are equal. Backward keeps the two inputs alone."""
    if takes_triton(gate):
        return swiglu_op(gate, up)
    if not torch.is_grad_enabled():
        return F.silu(gate).mul_(up)
    return TorchSwiglu.apply(gate, up)


class TorchRelu2(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.relu(x).square_()

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return relu2_gradient(x, dy)


class TorchSwiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        return swiglu_gradients(gate, up, dy)


def relu2_gradient(x: Tensor, dy: Tensor) -> Tensor:
    """The gradient of relu2's x for one of its answer; the shapes are equal."""
    return relu2_backward_op(x, dy) if takes_triton(x) else torch.relu(x).mul_(dy).mul_(2)


def swiglu_gradients(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of swiglu's gate and up for one of its answer; the shapes are equal."""
    if takes_triton(gate):
        return swiglu_backward_op(gate, up, dy)
    sigmoid = torch.sigmoid(gate)
    active = gate * sigmoid
    dup = active * dy
    # silu' = sigmoid + silu (1 - sigmoid)
    dgate = torch.addcmul(active, active, sigmoid, value=-1).add_(sigmoid).mul_(up).mul_(dy)
    return dgate, dup


def flat_launch(name: str, **tensors: Tensor) -> Launch:
    """A kernel over tensors of one size, laid out flat."""
    size = next(iter(tensors.values())).numel()
    arguments = {**tensors, "size": size, "BLOCK": BLOCK}
    return Launch(getattr(triton_module("activation_triton"), name), (cdiv(size, BLOCK),), arguments, WARPS, 1)


@torch.library.custom_op("limbeck::relu2", mutates_args=())
def relu2_op(x: Tensor) -> Tensor:
    """relu2 by Triton."""
    y = x.new_empty(x.shape)
    if x.numel():
        flat_launch("relu2_forward", x=x.contiguous(), y=y).enqueue(x)
    return y


@torch.library.custom_op("limbeck::relu2_backward", mutates_args=())
def relu2_backward_op(x: Tensor, dy: Tensor) -> Tensor:
    dx = x.new_empty(x.shape)
    if x.numel():
        flat_launch("relu2_backward", x=x.contiguous(), dy=dy.contiguous(), dx=dx).enqueue(x)
    return dx


@torch.library.custom_op("limbeck::swiglu", mutates_args=())
def swiglu_op(gate: Tensor, up: Tensor) -> Tensor:
    """swiglu by Triton."""
    y = gate.new_empty(gate.shape)
    if gate.numel():
        flat_launch("swiglu_forward", gate=gate.contiguous(), up=up.contiguous(), y=y).enqueue(gate)
    return y


@torch.library.custom_op("limbeck::swiglu_backward", mutates_args=())
def swiglu_backward_op(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = gate.new_empty(gate.shape), up.new_empty(up.shape)
    if gate.numel():
        tensors = {"gate": gate.contiguous(), "up": up.contiguous(), "dy": dy.contiguous()}
        flat_launch("swiglu_backward", **tensors, dgate=dgate, dup=dup).enqueue(gate)
    return dgate, dup


relu2_op.register_fake(lambda x: x.new_empty(x.shape))
relu2_backward_op.register_fake(lambda x, dy: x.new_empty(x.shape))
swiglu_op.register_fake(lambda gate, up: gate.new_empty(gate.shape))
swiglu_backward_op.register_fake(lambda gate, up, dy: (gate.new_empty(gate.shape), up.new_empty(up.shape)))


def keep_inputs(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


relu2_op.register_autograd(lambda ctx, dy: relu2_backward_op(*ctx.saved_tensors, dy), setup_context=keep_inputs)
swiglu_op.register_autograd(lambda ctx, dy: swiglu_backward_op(*ctx.saved_tensors, dy), setup_context=keep_inputs)
