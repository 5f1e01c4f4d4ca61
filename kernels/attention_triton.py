"""Triton kernels of decode attention: one query token over a cache that is split among programs; see `attention`."""

from __future__ import annotations

import triton
import triton.language as tl

NEVER = tl.constexpr(-1e30)  # below every score, and finite: the difference of two infinities would be NaN


@triton.jit(do_not_specialize=["length"])
def decode_parts(
    q, k, v, lengths, parts, logs,
    length, scale, stride_qb, stride_qh, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program gives the GROUP query heads of one key-value head their softmax over its share of the tokens:
    the means [B, H, SPLITS, D], and log2 of the sums of exponentials [B, H, SPLITS]."""
    i_batch = (tl.program_id(0) // HEADS).to(tl.int64)
    i_head = tl.program_id(0) % HEADS
    i_split = tl.program_id(1)
    if lengths is not None:
        length = tl.load(lengths + i_batch).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_T) * BLOCK_T
    begin = i_split * share
    end = tl.minimum(begin + share, length)
    o_group, o_size, o_block = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_T)
    m_group, m_size = o_group < GROUP, o_size < SIZE
    o_query = i_head * GROUP + o_group
    query = tl.load(
        q + i_batch * stride_qb + o_query[:, None] * stride_qh + o_size[None, :],
        mask=m_group[:, None] & m_size[None, :], other=0.0,
    )  # fmt: skip
    k += i_batch * stride_kb + i_head.to(tl.int64) * stride_kh
    v += i_batch * stride_vb + i_head.to(tl.int64) * stride_vh
    largest = tl.full([BLOCK_G], NEVER, tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    mean = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for start in tl.range(begin, end, BLOCK_T, num_stages=STAGES):
        o_token = (start + o_block).to(tl.int64)
        m_token = o_token < end
        # [BLOCK_G, BLOCK_D] [BLOCK_D, BLOCK_T]
        key = tl.load(
            k + o_token[None, :] * stride_kt + o_size[:, None], mask=m_token[None, :] & m_size[:, None], other=0.0
        )
        score = tl.dot(query, key, input_precision="ieee") * (scale * 1.4426950408889634)
        score = tl.where(m_token[None, :], score, float("-inf"))
        raised = tl.maximum(largest, tl.max(score, 1))
        shrunk = tl.exp2(largest - raised)
        weight = tl.exp2(score - raised[:, None])
        total = total * shrunk + tl.sum(weight, 1)
        value = tl.load(
            v + o_token[:, None] * stride_vt + o_size[None, :], mask=m_token[:, None] & m_size[None, :], other=0.0
        )
        # [BLOCK_G, BLOCK_T] [BLOCK_T, BLOCK_D]
        mean = mean * shrunk[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        largest = raised
    mean = mean / tl.where(total > 0, total, 1.0)[:, None]
    row = (tl.program_id(0).to(tl.int64) * GROUP + o_group) * SPLITS + i_split  # program 0 is i_batch HEADS + i_head
    tl.store(parts + row[:, None] * SIZE + o_size[None, :], mean, mask=m_group[:, None] & m_size[None, :])
    tl.store(logs + row, tl.where(total > 0, largest + tl.log2(tl.where(total > 0, total, 1.0)), NEVER), mask=m_group)


@triton.jit
def decode_join(parts, logs, y, SIZE: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr):
    """A program adds up the shares of one query head, always in the same order."""
    row = tl.program_id(0).to(tl.int64)
    o_split, o_size = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    m_size = o_size < SIZE
    log = tl.load(logs + row * SPLITS + o_split)
    weight = tl.exp2(log - tl.max(log, 0))
    place = (row * SPLITS + o_split)[:, None] * SIZE + o_size[None, :]
    part = tl.load(parts + place, mask=m_size[None, :], other=0.0)  # [SPLITS, BLOCK_D]
    joined = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(y + row * SIZE + o_size, joined.to(y.dtype.element_ty), mask=m_size)
