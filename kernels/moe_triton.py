"""Triton kernels of products over groups of rows (moe.py): a tile of rows belongs to one group, and a program finds out
which from where the groups end, so that nothing waits for the host and the grid is the same whatever the groups are.

Shapes: [m] rows, [E] groups, [N] outputs, [K] what is summed over (of `grouped_outer` the rows are).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def grouped_rows(
    x, weight, ends, y, s_x_m, s_weight_e, s_weight_n, s_weight_k, s_y_m,
    GROUPS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUPS_2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y [m, N]: row i of group e is x_i [K] times weight[e] [N, K] transposed (strides say how it lies). Program (t, n)
    has the t-th tile of rows, tiles counted group after group; those that are too many leave at once."""
    i_tile = tl.program_id(0)
    o_group = tl.arange(0, GROUPS_2)
    m_group = o_group < GROUPS
    end = tl.load(ends + o_group, mask=m_group, other=0)
    begin = tl.load(ends + o_group - 1, mask=m_group & (o_group > 0), other=0)
    tiles = tl.where(m_group, (end - begin + BLOCK_M - 1) // BLOCK_M, 0)
    before = tl.cumsum(tiles, 0) - tiles
    mine = (before <= i_tile) & (i_tile < before + tiles)  # of one group, or of none
    if tl.sum(mine.to(tl.int32), 0) == 0:
        return
    group = tl.sum(tl.where(mine, o_group, 0), 0).to(tl.int64)
    first = tl.sum(tl.where(mine, begin + (i_tile - before) * BLOCK_M, 0), 0)
    last = tl.sum(tl.where(mine, end, 0), 0)
    o_row = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K).to(tl.int64)
    m_row, m_n = o_row < last, o_n < N
    p_x = x + o_row[:, None] * s_x_m + o_k[None, :]
    p_weight = weight + group * s_weight_e + o_n[None, :] * s_weight_n + o_k[:, None] * s_weight_k
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        m_k = start + o_k < K
        b_x = tl.load(p_x, mask=m_row[:, None] & m_k[None, :], other=0.0)
        b_weight = tl.load(p_weight, mask=m_k[:, None] & m_n[None, :], other=0.0)
        # [BLOCK_M, BLOCK_K] [BLOCK_K, BLOCK_N]
        total += tl.dot(b_x, b_weight, input_precision="ieee")
        p_x += BLOCK_K
        p_weight += BLOCK_K * s_weight_k
    p_y = y + o_row[:, None] * s_y_m + o_n[None, :]
    tl.store(p_y, total.to(y.dtype.element_ty), mask=m_row[:, None] & m_n[None, :])


@triton.jit
def grouped_outer(
    y, x, ends, out, s_y_m, s_x_m,
    N: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out [E, N, K]: of each group the sum over its rows of y_i [N] x_i [K]^T; 0 for a group without rows. Program
    (e, n, k) has a tile of one group."""
    i_group = tl.program_id(0)
    begin = tl.load(ends + i_group - 1, mask=i_group > 0, other=0)
    end = tl.load(ends + i_group)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    o_m = tl.arange(0, BLOCK_M)
    m_n, m_k = o_n < N, o_k < K
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in tl.range(begin, end, BLOCK_M, num_stages=STAGES):
        o_row = (start + o_m).to(tl.int64)
        m_row = o_row < end
        b_y = tl.load(y + o_row[None, :] * s_y_m + o_n[:, None], mask=m_row[None, :] & m_n[:, None], other=0.0)
        b_x = tl.load(x + o_row[:, None] * s_x_m + o_k[None, :], mask=m_row[:, None] & m_k[None, :], other=0.0)
        # [BLOCK_N, BLOCK_M] [BLOCK_M, BLOCK_K]
        total += tl.dot(b_y, b_x, input_precision="ieee")
    p_out = out + i_group.to(tl.int64) * N * K + o_n.to(tl.int64)[:, None] * K + o_k[None, :]
    tl.store(p_out, total.to(out.dtype.element_ty), mask=m_n[:, None] & m_k[None, :])
