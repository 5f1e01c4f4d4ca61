"""The short causal convolution with its SiLU in Triton, without atomics; what it computes stands in `causal_conv1d`.

Forward: a program for each tile of tokens and channels. Backward: a program walks a segment of tokens with the last
inputs and the gradients that still gather in registers, so that x and dy are read once; sums over tokens for weight
and bias are noted for each segment. A width below 4 leaves the oldest taps out.
Names: p_ pointer, i_ index, m_ mask, o_ offset, s_ stride; `back` counts tokens before the current one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import CAPABILITIES, Launch, capability, placed, power_of_two, strides


@triton.jit
def logistic(v):
    """1 / (1 + e^-v), without overflow."""
    e = tl.exp(-tl.abs(v))
    return tl.where(v >= 0, 1.0, e) / (1 + e)


@triton.jit
def load_tap(p_weight, i_c, m_c, back: tl.constexpr, s_weight_c, s_weight_k, WIDTH: tl.constexpr):
    """The weight of the token `back` before; 0 beyond the width."""
    if back < WIDTH:
        tap = tl.load(p_weight + i_c * s_weight_c + (WIDTH - 1 - back) * s_weight_k, mask=m_c, other=0.0)
        return tap.to(tl.float32)
    return tl.zeros(i_c.shape, tl.float32)


@triton.jit
def starts_document(p_seq, i_t, tokens):
    """Whether a token is the first of a document; token 0 continues that of the initial state."""
    inside = (i_t > 0) & (i_t < tokens)
    return tl.load(p_seq + i_t, mask=inside, other=0) != tl.load(p_seq + i_t - 1, mask=inside, other=0)


@triton.jit(do_not_specialize=["tokens"])
def conv_forward(
    p_x, p_weight, p_bias, p_first, p_seq, p_y, tokens,
    s_x_b, s_x_t, s_x_c, s_weight_c, s_weight_k, s_first_b, s_first_c, s_first_k,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, SILU: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of tokens, tiles of channels, batch)."""
    start, i_b = tl.program_id(0).to(tl.int64) * BLOCK_T, tl.program_id(2).to(tl.int64)
    i_t = (start + tl.arange(0, BLOCK_T)).to(tl.int32)
    i_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = i_c < CHANNELS
    p_x += i_b * s_x_b + start * s_x_t
    o_x = tl.arange(0, BLOCK_T)[:, None] * s_x_t + i_c[None, :] * s_x_c
    if p_seq is not None:
        p_seq += i_b * tokens
    if p_bias is None:
        y = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    else:
        bias = tl.load(p_bias + i_c, mask=m_c, other=0.0).to(tl.float32)
        y = tl.broadcast_to(bias[None, :], (BLOCK_T, BLOCK_C))
    joined = i_t < tokens  # whether a token and the one `back` before it lie in one document
    for back in tl.static_range(0, WIDTH):
        if p_seq is not None and back > 0:
            joined = joined & (starts_document(p_seq, i_t - (back - 1), tokens) == 0)
        mask = (joined & (i_t >= back))[:, None] & m_c[None, :]
        x = tl.load(p_x + o_x - back * s_x_t, mask=mask, other=0.0).to(tl.float32)
        if p_first is not None and back > 0:
            o_k = (i_t - back + (WIDTH - 1))[:, None] * s_first_k + i_c[None, :] * s_first_c
            mask = (joined & (i_t < back))[:, None] & m_c[None, :]
            x += tl.load(p_first + i_b * s_first_b + o_k, mask=mask, other=0.0).to(tl.float32)
        y += x * load_tap(p_weight, i_c, m_c, back, s_weight_c, s_weight_k, WIDTH)[None, :]
    if SILU:
        y *= logistic(y)
    o_y = (i_b * tokens + start + tl.arange(0, BLOCK_T)[:, None]) * CHANNELS + i_c[None, :]
    tl.store(p_y + o_y, y.to(p_y.dtype.element_ty), mask=(i_t < tokens)[:, None] & m_c[None, :])


@triton.jit
def load_input(p_x, p_first, t, s_x_t, s_first_k, m_c, WIDTH: tl.constexpr):
    """The input at a token, which may lie before the first."""
    x = tl.load(p_x + t * s_x_t, mask=m_c & (t >= 0), other=0.0).to(tl.float32)
    if p_first is not None:
        x += tl.load(p_first + (t + WIDTH - 1) * s_first_k, mask=m_c & (t < 0) & (t > -WIDTH), other=0.0).to(tl.float32)
    return x


@triton.jit(do_not_specialize=["tokens", "segment"])
def conv_backward(
    p_dy, p_x, p_weight, p_bias, p_first, p_seq, p_dx, p_dfirst, p_sums, tokens, segment,
    s_dy_b, s_dy_t, s_dy_c, s_x_b, s_x_t, s_x_c, s_weight_c, s_weight_k, s_first_b, s_first_c, s_first_k,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, SILU: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (segments of tokens, tiles of channels, batch). `p_sums` [batch, segments, WIDTH + 1, channels] takes the
    gradients of the weight's columns and of the bias, `p_dfirst` [batch, WIDTH - 1, channels] the initial state's."""
    number, i_b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    start = number * segment
    stop = tl.minimum(start + segment, tokens)
    i_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = i_c < CHANNELS
    p_x += i_b * s_x_b + i_c.to(tl.int64) * s_x_c
    p_dy += i_b * s_dy_b + i_c.to(tl.int64) * s_dy_c
    p_dx += i_b * tokens * CHANNELS + i_c
    if p_first is not None:
        p_first += i_b * s_first_b + i_c * s_first_c
        p_dfirst += i_b * (WIDTH - 1) * CHANNELS + i_c
    if p_seq is not None:
        p_seq += i_b * tokens
    w0 = load_tap(p_weight, i_c, m_c, 0, s_weight_c, s_weight_k, WIDTH)
    w1 = load_tap(p_weight, i_c, m_c, 1, s_weight_c, s_weight_k, WIDTH)
    w2 = load_tap(p_weight, i_c, m_c, 2, s_weight_c, s_weight_k, WIDTH)
    w3 = load_tap(p_weight, i_c, m_c, 3, s_weight_c, s_weight_k, WIDTH)
    zero = tl.zeros((BLOCK_C,), tl.float32)
    bias = zero if p_bias is None else tl.load(p_bias + i_c, mask=m_c, other=0.0).to(tl.float32)
    dbias, dw0, dw1, dw2, dw3 = zero, zero, zero, zero, zero
    # The inputs 1, 2, 3 tokens back where they are of the current token's document, 0 elsewhere; whether they are;
    # and the gradients that gather for them.
    x1 = load_input(p_x, p_first, start - 1, s_x_t, s_first_k, m_c, WIDTH)
    x2 = load_input(p_x, p_first, start - 2, s_x_t, s_first_k, m_c & (WIDTH > 2), WIDTH)
    x3 = load_input(p_x, p_first, start - 3, s_x_t, s_first_k, m_c & (WIDTH > 3), WIDTH)
    j1, j2, j3 = zero + 1, zero + 1, zero + 1
    if p_seq is not None:
        j2 = tl.where(starts_document(p_seq, start - 1, tokens), 0.0, j2)
        j3 = tl.where(starts_document(p_seq, start - 2, tokens), 0.0, j2)
        x2, x3 = tl.where(j2 > 0, x2, 0.0), tl.where(j3 > 0, x3, 0.0)
    dx1, dx2, dx3 = zero, zero, zero
    # After the segment its last tokens still gather, from dy and inputs of the next; the sums stay its own.
    for t in range(start, stop + WIDTH - 1):
        inside = t < tokens
        x0 = tl.load(p_x + t * s_x_t, mask=m_c & inside, other=0.0).to(tl.float32)
        dy = tl.load(p_dy + t * s_dy_t, mask=m_c & inside, other=0.0).to(tl.float32)
        if p_seq is not None:
            kept = tl.where(starts_document(p_seq, t, tokens), 0.0, 1.0)
            j1, j2, j3 = j1 * kept, j2 * kept, j3 * kept
            x1, x2, x3 = tl.where(j1 > 0, x1, 0.0), tl.where(j2 > 0, x2, 0.0), tl.where(j3 > 0, x3, 0.0)
        if SILU:
            pre = bias + w0 * x0 + w1 * x1
            if WIDTH > 2:
                pre += w2 * x2
            if WIDTH > 3:
                pre += w3 * x3
            s = logistic(pre)
            dy *= s * (1 + pre * (1 - s))
        own = tl.where(t < stop, dy, 0.0)
        dbias += own
        dw0 += own * x0
        dw1 += own * x1
        dw2 += own * x2
        dw3 += own * x3
        dx0 = w0 * dy
        dx1 += w1 * dy * j1
        dx2 += w2 * dy * j2
        dx3 += w3 * dy * j3
        done = dx1 if WIDTH == 2 else (dx2 if WIDTH == 3 else dx3)
        o_done = t - (WIDTH - 1)
        tl.store(p_dx + o_done * CHANNELS, done.to(p_dx.dtype.element_ty), mask=m_c & (o_done >= start))
        if p_first is not None:
            m_first = m_c & (o_done < 0)
            tl.store(p_dfirst + t * CHANNELS, done.to(p_dfirst.dtype.element_ty), mask=m_first)
        x3, x2, x1 = x2, x1, x0
        dx3, dx2, dx1 = dx2, dx1, dx0
        j3, j2, j1 = j2, j1, zero + 1
    o_sums = (i_b * tl.num_programs(0) + number) * (WIDTH + 1) * CHANNELS + i_c
    tl.store(p_sums + o_sums + (WIDTH - 1) * CHANNELS, dw0, mask=m_c)
    tl.store(p_sums + o_sums + (WIDTH - 2) * CHANNELS, dw1, mask=m_c)
    if WIDTH > 2:
        tl.store(p_sums + o_sums + (WIDTH - 3) * CHANNELS, dw2, mask=m_c)
    if WIDTH > 3:
        tl.store(p_sums + o_sums + (WIDTH - 4) * CHANNELS, dw3, mask=m_c)
    tl.store(p_sums + o_sums + WIDTH * CHANNELS, dbias, mask=m_c)


@triton.jit
def conv_step(
    p_state, p_x, p_weight, p_bias, p_y,
    s_state_b, s_state_c, s_state_k, s_x_b, s_x_c, s_weight_c, s_weight_k,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, SILU: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of channels, batch)."""
    i_b = tl.program_id(1).to(tl.int64)
    i_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = i_c < CHANNELS
    p_state += i_b * s_state_b + i_c * s_state_c
    x = tl.load(p_x + i_b * s_x_b + i_c * s_x_c, mask=m_c, other=0.0).to(p_state.dtype.element_ty)
    y = x.to(tl.float32) * load_tap(p_weight, i_c, m_c, 0, s_weight_c, s_weight_k, WIDTH)
    # Every column is read before one is written: a tile narrower than the threads lies in several of them at once.
    if WIDTH > 3:
        third = tl.load(p_state + 2 * s_state_k, mask=m_c, other=0.0)
        y += third.to(tl.float32) * load_tap(p_weight, i_c, m_c, WIDTH - 3, s_weight_c, s_weight_k, WIDTH)
    if WIDTH > 2:
        second = tl.load(p_state + s_state_k, mask=m_c, other=0.0)
        y += second.to(tl.float32) * load_tap(p_weight, i_c, m_c, WIDTH - 2, s_weight_c, s_weight_k, WIDTH)
    first = tl.load(p_state, mask=m_c, other=0.0)
    y += first.to(tl.float32) * load_tap(p_weight, i_c, m_c, WIDTH - 1, s_weight_c, s_weight_k, WIDTH)
    if p_bias is not None:
        y += tl.load(p_bias + i_c, mask=m_c, other=0.0).to(tl.float32)
    tl.debug_barrier()
    if WIDTH > 2:
        tl.store(p_state, second, mask=m_c)
    if WIDTH > 3:
        tl.store(p_state + s_state_k, third, mask=m_c)
    tl.store(p_state + (WIDTH - 2) * s_state_k, x, mask=m_c)
    if SILU:
        y *= logistic(y)
    tl.store(p_y + i_b * CHANNELS + i_c, y.to(p_y.dtype.element_ty), mask=m_c)


class ConvSizes(NamedTuple):
    """Tokens and channels of a tile, warps."""

    tokens: int
    channels: int
    warps: int


# For each compute capability: forward, backward, step.
# Loads of 16 bytes a thread forward, where twice the tile spills registers; 4 bytes backward, many threads instead.
SIZES = {known: (ConvSizes(16, 128, 4), ConvSizes(128, 256, 4), ConvSizes(1, 256, 4)) for known in CAPABILITIES}


class Conv(NamedTuple):
    """One convolution's inputs."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    initial_state: Tensor | None
    seq_idx: Tensor | None
    silu: bool

    def placed(self) -> Conv:
        """The same as the kernels read it: all but bias and documents where they lie."""
        bias, seq_idx = (None if tensor is None else tensor.contiguous() for tensor in (self.bias, self.seq_idx))
        return self._replace(x=placed(self.x), bias=bias, seq_idx=seq_idx)

    def common(self) -> dict[str, Any]:
        """The arguments that both directions take."""
        first = (0, 0, 0) if self.initial_state is None else self.initial_state.stride()
        return {
            "p_x": self.x, "p_weight": self.weight, "p_bias": self.bias, "p_first": self.initial_state,
            "p_seq": self.seq_idx, "tokens": self.x.shape[1], **strides("x", "btc", self.x),
            **strides("weight", "ck", self.weight),
            "s_first_b": first[0], "s_first_c": first[1], "s_first_k": first[2],
            "CHANNELS": self.x.shape[2], "WIDTH": self.weight.shape[1], "SILU": self.silu,
        }  # fmt: skip


def forward_launch(conv: Conv, y: Tensor, device: int) -> Launch:
    """y [B, T, C]."""
    sizes = SIZES[device][0]
    batch, tokens, channels = conv.x.shape
    block_t, block_c = (min(power_of_two(n), most) for n, most in ((tokens, sizes.tokens), (channels, sizes.channels)))
    arguments = conv.common() | {"p_y": y, "BLOCK_T": block_t, "BLOCK_C": block_c}
    grid = (-(-tokens // block_t), -(-channels // block_c), batch)
    return Launch(conv_forward, grid, arguments, sizes.warps, 1)


def backward_launch(conv: Conv, dy: Tensor, dx: Tensor, dfirst: Tensor | None, sums: Tensor, device: int) -> Launch:
    """dx [B, T, C], the initial state's [B, K - 1, C], and [B, segments, K + 1, C] for weight and bias."""
    sizes = SIZES[device][1]
    batch, _, channels = conv.x.shape
    block_c = min(power_of_two(channels), sizes.channels)
    arguments = conv.common() | strides("dy", "btc", dy)
    arguments |= {"p_dy": dy, "p_dx": dx, "p_dfirst": dfirst, "p_sums": sums}
    arguments |= {"segment": sizes.tokens, "BLOCK_C": block_c}
    return Launch(conv_backward, (sums.shape[1], -(-channels // block_c), batch), arguments, sizes.warps, 1)


def step_launch(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, y: Tensor, device: int
) -> Launch:
    """y [B, C]."""
    sizes = SIZES[device][2]
    batch, channels = x.shape
    # A narrower tile would lie in several threads at once, which may read what another has written already.
    block_c = sizes.channels
    arguments: dict[str, Any] = {
        "p_state": state, "p_x": x, "p_weight": weight, "p_bias": bias, "p_y": y,
        **strides("state", "bck", state), **strides("x", "bc", x), **strides("weight", "ck", weight),
        "CHANNELS": channels, "WIDTH": weight.shape[1], "SILU": silu, "BLOCK_C": block_c,
    }  # fmt: skip
    return Launch(conv_step, (-(-channels // block_c), batch), arguments, sizes.warps, 1)


def forward(given: Conv) -> Tensor:
    """y [B, T, C] in the dtype of x."""
    y = torch.empty(given.x.shape, dtype=given.x.dtype, device=given.x.device)
    forward_launch(given.placed(), y, capability(y.device)).enqueue(y)
    return y


def backward(given: Conv, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias and initial_state, None for what is not there."""
    conv, device = given.placed(), capability(dy.device)
    batch, tokens, channels = conv.x.shape
    width = conv.weight.shape[1]
    dx = torch.empty(conv.x.shape, dtype=conv.x.dtype, device=dy.device)
    first = conv.initial_state
    dfirst = None if first is None else first.new_empty((batch, width - 1, channels))
    segments = -(-tokens // SIZES[device][1].tokens)
    sums = dx.new_empty((batch, segments, width + 1, channels), dtype=torch.float32)
    backward_launch(conv, placed(dy), dx, dfirst, sums, device).enqueue(dy)
    total = sums.sum((0, 1))
    return (
        dx,
        total[:width].T.contiguous().to(conv.weight.dtype),
        None if conv.bias is None else total[width].to(conv.bias.dtype, copy=True),
        None if dfirst is None else dfirst.mT.contiguous(),
    )
