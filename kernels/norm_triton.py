"""Triton kernels of the norms. A program holds ROWS rows of one group of channels [ROWS, BLOCK]; see `norm`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def norm_forward(
    x, added, z, weight, y, rms, rows, eps, stride_x, stride_added, stride_z,
    SIZE: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """What is `added` to x stays in it; the gate `z` does not."""
    i_group = tl.program_id(1)
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_inside = tl.arange(0, BLOCK)
    o_column = i_group * SIZE + o_inside
    m_row, m_column = o_row < rows, o_inside < SIZE
    mask = m_row[:, None] & m_column[None, :]
    # [ROWS, BLOCK]
    p_x = x + o_row[:, None] * stride_x + o_column[None, :]
    u = tl.load(p_x, mask=mask, other=0.0).to(tl.float32)
    out = o_row[:, None] * (GROUPS * SIZE) + o_column[None, :]
    if added is not None:
        more = tl.load(added + o_row[:, None] * stride_added + o_column[None, :], mask=mask, other=0.0)
        total = (u + more.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(p_x, total, mask=mask)
        u = total.to(tl.float32)  # rounded, as a sum by itself would be
    if GATED:
        gate = tl.load(z + o_row[:, None] * stride_z + o_column[None, :], mask=mask, other=0.0).to(tl.float32)
        u *= gate * tl.sigmoid(gate)
    inverse = tl.rsqrt(tl.sum(u * u, 1) / SIZE + eps)  # [ROWS]
    if rms is not None:
        tl.store(rms + o_row * GROUPS + i_group, inverse, mask=m_row)
    scale = tl.load(weight + o_column, mask=m_column, other=0.0).to(tl.float32)
    tl.store(y + out, (u * inverse[:, None] * scale[None, :]).to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def norm_backward(
    dy, x, z, weight, rms, dx, dz, dweight,
    rows, stride_dy, stride_x, stride_z,
    SIZE: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    GATED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program walks over every num_programs(0)-th tile and leaves its part of dweight [programs, C]."""
    i_part, i_group = tl.program_id(0), tl.program_id(1)
    o_inside = tl.arange(0, BLOCK)
    o_column = i_group * SIZE + o_inside
    m_column = o_inside < SIZE
    scale = tl.load(weight + o_column, mask=m_column, other=0.0).to(tl.float32)
    summed = tl.zeros([ROWS, BLOCK], tl.float32)
    for i_tile in tl.range(i_part, tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        o_row = tl.cast(i_tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        m_row = o_row < rows
        mask = m_row[:, None] & m_column[None, :]
        u = tl.load(x + o_row[:, None] * stride_x + o_column[None, :], mask=mask, other=0.0).to(tl.float32)
        dout = tl.load(dy + o_row[:, None] * stride_dy + o_column[None, :], mask=mask, other=0.0).to(tl.float32)
        inverse = tl.load(rms + o_row * GROUPS + i_group, mask=m_row, other=0.0)
        if GATED:
            gate = tl.load(z + o_row[:, None] * stride_z + o_column[None, :], mask=mask, other=0.0).to(tl.float32)
            sigmoid = tl.sigmoid(gate)
            active = gate * sigmoid
            normed = u * active * inverse[:, None]
        else:
            normed = u * inverse[:, None]
        summed += dout * normed
        dout *= scale[None, :]
        mean = tl.sum(dout * normed, 1) / SIZE
        du = (dout - normed * mean[:, None]) * inverse[:, None]
        out = o_row[:, None] * (GROUPS * SIZE) + o_column[None, :]
        if GATED:
            slope = sigmoid + active * (1 - sigmoid)  # silu'
            tl.store(dz + out, (du * u * slope).to(dz.dtype.element_ty), mask=mask)
            du *= active
        tl.store(dx + out, du.to(dx.dtype.element_ty), mask=mask)
    part = tl.sum(summed, 0)
    tl.store(dweight + i_part.to(tl.int64) * (GROUPS * SIZE) + o_column, part, mask=m_column)
