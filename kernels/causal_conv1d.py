"""Mamba's short depthwise convolution over time, with its SiLU: whole sequences, and one decoding step.

y_t = act(bias + sum_j weight[:, j] x_{t-K+1+j}); what lies before a document's first token counts as zero, or as
the initial state. Shapes: [B] batch, [T] tokens, [C] channels, [K] width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .launch import capability, takes_operator, takes_triton, triton_module
from .rows import cdiv
from .ssd_torch import document_numbers
from .tracing import STATE, iterations

SEGMENT = 128  # tokens of which a program of the Triton backward leaves one sum


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> Any:
    """y [B, T, C] of x [B, T, C] (any strides), weight [C, K], bias [C].

    Where `seq_idx` [B, T] changes between neighbours a new document begins. `initial_state` [B, C, K-1] holds the
    K-1 inputs before token 0, of the same document. With `return_final_state` the answer is (y, state [B, C, K-1]):
    the last K-1 inputs of the last token's document, zeros where it is shorter.

    Raises ValueError where shapes disagree or the activation is neither "silu" nor None.
    """
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[0] != x.shape[2] or x.shape[1] < 1:
        raise ValueError(
            f"causal_conv1d: expected x [B, T, C] and weight [C, K], got {tuple(x.shape)}, {tuple(weight.shape)}"
        )
    check_activation(activation)
    batch, tokens, channels = x.shape
    before = weight.shape[1] - 1
    expected = {
        "bias": (bias, (channels,)),
        "seq_idx": (seq_idx, (batch, tokens)),
        "initial_state": (initial_state, (batch, channels, before)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"causal_conv1d: {name} has shape {tuple(tensor.shape)}, expected {shape}")
    if takes_operator(x):
        y = conv_op(x, weight, bias, initial_state, seq_idx, activation == "silu")
    else:
        y = TorchConv.apply(x, weight, bias, initial_state, seq_idx, activation)
    return (y, final_inputs(x, before, seq_idx, initial_state)) if return_final_state else y


def causal_conv1d_step(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
) -> Tensor:
    """y [B, C] of one token x [B, C]; `state` [B, C, K-1], the inputs before it, is moved on in place. No gradient.

    Raises ValueError where shapes disagree or the activation is neither "silu" nor None.
    """
    check_activation(activation)
    expected = (x.shape[0], x.shape[1], weight.shape[1] - 1)
    if state.shape != expected:
        raise ValueError(f"causal_conv1d_step: state has shape {tuple(state.shape)}, expected {expected}")
    if takes_operator(x):
        with torch.no_grad():
            return step_op(state, x, weight, bias, activation == "silu")
    return torch_step(state, x, weight, bias, activation)


def check_activation(activation: str | None) -> None:
    if activation not in ("silu", None):
        raise ValueError(f"causal_conv1d: activation is {activation!r}, expected 'silu' or None")


@torch.no_grad()
def torch_step(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    window = torch.cat((state.mT, x[:, None].to(state.dtype)), 1)  # [B, K, C]: channels last, as the cache lays it out
    state.mT.copy_(window[:, 1:])
    y = (window.to(weight.dtype) * weight.T.contiguous()).sum(1)
    if bias is not None:
        y += bias
    return (F.silu(y, inplace=True) if activation else y).to(x.dtype)


def final_inputs(x: Tensor, before: int, seq_idx: Tensor | None, initial_state: Tensor | None) -> Tensor:
    """The last `before` inputs [B, C, before] of the last token's document."""
    tokens = x.shape[1]
    there = min(before, tokens)
    # narrow, not an index: that asks for a CUDA build even where tensors are fake.
    recent = x.narrow(1, tokens - there, there).transpose(1, 2)
    if seq_idx is not None:
        document = document_numbers(seq_idx)
        last = document.narrow(1, tokens - 1, 1)
        recent = recent * (document == last).narrow(1, tokens - there, there).unsqueeze(1)
    missing = before - there
    if not missing:
        return recent if seq_idx is not None else recent.clone()
    if initial_state is None:
        return F.pad(recent, (missing, 0))
    older = initial_state.narrow(2, before - missing, missing).to(x.dtype)
    if seq_idx is not None:
        older = older * (last == 0).unsqueeze(2)
    return torch.cat((older, recent), -1)


class TorchConv(torch.autograd.Function):
    """Shifted multiply-adds on channels-last rows, a block of tokens at a time so that it stays in the cache: no
    transpose, and slices of a wider tensor are read in place. Backward keeps the inputs and recomputes the rest."""

    @staticmethod
    def forward(ctx, x, weight, bias, initial_state, seq_idx, activation):
        ctx.save_for_backward(x, weight, bias, initial_state, seq_idx)
        ctx.activation = activation
        return torch_conv(x, weight, bias, initial_state, seq_idx, activation)

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, initial_state, seq_idx = ctx.saved_tensors
        return *torch_conv_backward(dy, x, weight, bias, initial_state, seq_idx, ctx.activation), None, None


def torch_conv(x, weight, bias, initial_state, seq_idx, activation) -> Tensor:
    """y [B, T, C]"""
    blocks = Blocks(x, weight, bias, initial_state, seq_idx)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for row, start, stop in blocks:
        pre = blocks.convolve(blocks.window(row, start, stop), row, start, stop)
        y[row, start:stop] = F.silu(pre, inplace=True) if activation else pre
    return y


def torch_conv_backward(dy, x, weight, bias, initial_state, seq_idx, activation) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias and initial_state, None for what is not there."""
    blocks = Blocks(x, weight, bias, initial_state, seq_idx)
    width = weight.shape[1]
    # In front of every row the inputs before it, whose gradient is the initial state's.
    dx = torch.zeros(x.shape[0], width - 1 + x.shape[1], x.shape[2], dtype=blocks.dtype, device=x.device)
    dkernel = torch.zeros_like(blocks.kernel)
    dbias = torch.zeros_like(blocks.kernel[0])
    for row, start, stop in blocks:
        window = blocks.window(row, start, stop)
        dpre = dy[row, start:stop].to(blocks.dtype)
        if activation:
            pre = blocks.convolve(window, row, start, stop)
            sigmoid = torch.sigmoid(pre)
            slope = torch.addcmul(pre, pre, sigmoid, value=-1).add_(1).mul_(sigmoid)  # silu'
            dpre = slope.mul_(dpre)
        dbias += dpre.sum(0)
        for column in range(width):
            inside = blocks.inside(row, start, stop, width - 1 - column)
            part = dpre if inside is None else dpre * inside
            dx[row, start + column : stop + column].addcmul_(part, blocks.kernel[column])
            dkernel[column] += (part * window[column : column + stop - start]).sum(0)
    return (
        dx[:, width - 1 :].to(x.dtype),
        dkernel.T.to(weight.dtype),
        None if bias is None else dbias.to(bias.dtype),
        None if initial_state is None else dx[:, : width - 1].transpose(1, 2).to(initial_state.dtype),
    )


class Blocks:
    """The blocks of tokens that the convolution works on, with the inputs and document boundaries of each."""

    tokens = 256

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, seq_idx: Tensor | None
    ) -> None:
        self.dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.x, self.initial_state = x, initial_state
        self.kernel = weight.to(self.dtype).T.contiguous()  # [K, C]
        self.bias = None if bias is None else bias.to(self.dtype)
        self.document = None if seq_idx is None else document_numbers(seq_idx)

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """(row, start, stop) of every block."""
        for row in iterations(range(self.x.shape[0])):
            for start in iterations(range(0, self.x.shape[1], self.tokens)):
                yield row, start, min(start + self.tokens, self.x.shape[1])

    def window(self, row: int, start: int, stop: int) -> Tensor:
        """The inputs of a block and the K-1 before it, [K - 1 + t, C]."""
        before = self.kernel.shape[0] - 1
        inputs = self.x[row, max(start - before, 0) : stop].to(self.dtype)
        missing = before + stop - start - inputs.shape[0]
        if not missing:
            return inputs
        if self.initial_state is None:
            return F.pad(inputs, (0, 0, missing, 0))
        return torch.cat((self.initial_state[row, :, before - missing :].T.to(self.dtype), inputs))

    def inside(self, row: int, start: int, stop: int, back: int) -> Tensor | None:
        """[t, 1], whether a token and the one `back` before it lie in one document; None where all do.

        What lies before token 0 is of its document."""
        if self.document is None or not back:
            return None
        document = self.document[row, max(start - back, 0) : stop]
        if not STATE.on and document[0] == document[-1]:
            return None
        document = F.pad(document, (back + stop - start - document.shape[0], 0))
        return (document[back:] == document[: stop - start])[:, None]

    def convolve(self, window: Tensor, row: int, start: int, stop: int) -> Tensor:
        """The sums before the activation, [t, C]."""
        width, size = self.kernel.shape[0], stop - start
        last = window[width - 1 :]
        pre = last * self.kernel[-1] if self.bias is None else torch.addcmul(self.bias, last, self.kernel[-1])
        for column in range(width - 1):
            inside = self.inside(row, start, stop, width - 1 - column)
            part = window[column : column + size]
            pre.addcmul_(part if inside is None else part * inside, self.kernel[column])
        return pre


@torch.library.custom_op("limbeck::causal_conv1d", mutates_args=())
def conv_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, seq_idx: Tensor | None, silu: bool
) -> Tensor:
    """CPU tensors go through the Triton kernels in Triton's interpreter, else through torch's."""
    if takes_triton(x):
        triton_conv = triton_module("conv_triton")
        return triton_conv.forward(triton_conv.Conv(x, weight, bias, initial_state, seq_idx, silu))
    return torch_conv(x, weight, bias, initial_state, seq_idx, "silu" if silu else None)


@torch.library.custom_op("limbeck::causal_conv1d_backward", mutates_args=())
def conv_backward_op(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, seq_idx: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight, bias and initial_state; empty for what is not there."""
    if takes_triton(x):
        triton_conv = triton_module("conv_triton")
        gradients = triton_conv.backward(triton_conv.Conv(x, weight, bias, initial_state, seq_idx, silu), dy)
    else:
        views = torch_conv_backward(dy, x, weight, bias, initial_state, seq_idx, "silu" if silu else None)
        gradients = (None if view is None else view.clone(memory_format=torch.contiguous_format) for view in views)
    dx, dweight, dbias, dfirst = (x.new_empty(0) if gradient is None else gradient for gradient in gradients)
    return dx, dweight, dbias, dfirst


def backward_workspace(x: Tensor, weight: Tensor) -> tuple[int, ...]:
    """Bytes of what the Triton backward adds up of weight and bias (`conv_triton.backward`)."""
    return (4 * x.shape[0] * cdiv(x.shape[1], SEGMENT) * (weight.shape[1] + 1) * x.shape[2],)


@conv_op.register_fake
def _(x, *rest):
    return x.new_empty(x.shape)


@conv_backward_op.register_fake
def _(dy, x, weight, bias, initial_state, seq_idx, silu):
    inputs = (x, weight, bias, initial_state)
    return tuple(x.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape) for tensor in inputs)


def keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.silu = inputs[5]


def conv_gradient(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    inputs = ctx.saved_tensors
    gradients = conv_backward_op(dy, *inputs, ctx.silu)
    needed = [None if tensor is None else gradient for tensor, gradient in zip(inputs, gradients, strict=False)]
    return *needed, None, None


conv_op.register_autograd(conv_gradient, setup_context=keep_inputs)


@torch.library.custom_op("limbeck::causal_conv1d_step", mutates_args=("state",))
def step_op(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """CPU tensors go through the Triton kernel in Triton's interpreter, else through torch."""
    if not takes_triton(x):
        return torch_step(state, x, weight, bias, "silu" if silu else None)
    y, bias = torch.empty(x.shape, dtype=x.dtype, device=x.device), None if bias is None else bias.contiguous()
    triton_module("conv_triton").step_launch(state, x, weight, bias, silu, y, capability(x.device)).enqueue(x)
    return y


@step_op.register_fake
def _(state, x, *rest):
    return x.new_empty(x.shape)
