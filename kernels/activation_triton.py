"""Triton kernels of the activations, one pass each over tensors laid out flat."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["size"])
def relu2_forward(x, y, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    value = tl.where(value > 0, value, value * 0)  # keeps NaN
    tl.store(y + at, (value * value).to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["size"])
def relu2_backward(x, dy, dx, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    gradient = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
    value = tl.where(value > 0, value, value * 0)
    tl.store(dx + at, (2 * value * gradient).to(dx.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["size"])
def swiglu_forward(gate, up, y, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    g = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + at, (g * tl.sigmoid(g) * u).to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["size"])
def swiglu_backward(gate, up, dy, dgate, dup, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    g = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
    gradient = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    active = g * sigmoid
    slope = sigmoid + active * (1 - sigmoid)  # silu'
    tl.store(dgate + at, (gradient * u * slope).to(dgate.dtype.element_ty), mask=mask)
    tl.store(dup + at, (gradient * active).to(dup.dtype.element_ty), mask=mask)
