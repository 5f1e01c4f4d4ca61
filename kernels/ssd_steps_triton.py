"""What the SSD scan's Triton kernels read of a step: a pass before them notes it for each token and head.

`scan_steps` writes float32 planes of [Q] tokens for each (sequence, chunk, head), in this order:

    step      clamp(softplus(dt + dt_bias)), 0 after the sequence's end
    coarse    the log2 of the decay from the chunk's start to the token, a sum of dt A log2(e)
    fine      what float32 rounded off that sum
    slope     d step / d dt, for the backward alone

Sums are float64 here and differences of them are what counts, so that one large step does not blur the small ones
after it. The decay over a document's first token is 2^-BORDER, which is 0 in float32, and no step's is less: sums stay
below 2^17, of which coarse + fine hold 48 bits. So a decay across documents is 0 without a mask.
Names: p_ pointer, i_ index, m_ mask, s_ stride; letters as in `ssd`.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
BORDER = tl.constexpr(1024.0)


@triton.jit
def softplus(v):
    """log(1 + e^v), with full relative precision where e^v is tiny."""
    e = tl.exp(-tl.abs(v))
    z = e / (2 + e)  # log(1 + e) = 2 artanh(z), z <= 1/3: the series below is cut off at z^17 / 17
    w = z * z
    series = 1 / 11 + w * (1 / 13 + w * (1 / 15))
    series = 1 + w * (1 / 3 + w * (1 / 5 + w * (1 / 7 + w * (1 / 9 + w * series))))
    return tl.maximum(v, 0.0) + 2 * z * series


@triton.jit(do_not_specialize=["tokens", "limit_low", "limit_high"])
def scan_steps(
    p_dt, p_A, p_bias, p_seq, p_steps, tokens, limit_low, limit_high, s_dt_b, s_dt_t, s_dt_h,
    HEADS: tl.constexpr, SOFTPLUS: tl.constexpr, PLANES: tl.constexpr, Q: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, tiles of heads, batch): `p_steps` [batch, chunks, heads, PLANES, Q]; 4 planes have the slope."""
    chunk, i_b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    start = chunk * Q
    i_q = tl.arange(0, Q)
    i_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    m_h = i_h < HEADS
    inside = start + i_q < tokens
    mask = inside[:, None] & m_h[None, :]
    p_dt += i_b * s_dt_b + start * s_dt_t
    raw = tl.load(p_dt + i_q[:, None] * s_dt_t + i_h[None, :] * s_dt_h, mask=mask, other=0.0).to(tl.float32)
    if p_bias is not None:
        raw += tl.load(p_bias + i_h, mask=m_h, other=0.0).to(tl.float32)[None, :]
    unclamped = softplus(raw) if SOFTPLUS else raw
    step = tl.minimum(tl.maximum(unclamped, limit_low), limit_high)
    step = tl.where(inside[:, None], step, 0.0)
    rate = tl.load(p_A + i_h, mask=m_h, other=0.0).to(tl.float32) * LOG2E
    decay = tl.maximum(step * rate[None, :], -BORDER)
    if p_seq is not None:
        p_seq += i_b * tokens + start
        after = inside & (start + i_q > 0)
        here = tl.load(p_seq + i_q, mask=after, other=0)
        before = tl.load(p_seq + i_q - 1, mask=after, other=0)
        decay = tl.where((here != before)[:, None], -BORDER, decay)
    total = tl.cumsum(decay.to(tl.float64), 0)
    coarse = total.to(tl.float32)
    fine = (total - coarse.to(tl.float64)).to(tl.float32)
    p_steps += ((i_b * tl.num_programs(0) + chunk) * HEADS + i_h)[None, :] * (PLANES * Q) + i_q[:, None]
    tl.store(p_steps, step, mask=m_h[None, :])
    tl.store(p_steps + Q, coarse, mask=m_h[None, :])
    tl.store(p_steps + 2 * Q, fine, mask=m_h[None, :])
    if PLANES > 3:
        slope = tl.where((unclamped >= limit_low) & (unclamped <= limit_high), 1.0, 0.0)
        if SOFTPLUS:
            e = tl.exp(-tl.abs(raw))
            slope *= tl.where(raw >= 0, 1.0, e) / (1 + e)  # the logistic function, without overflow
        tl.store(p_steps + 3 * Q, slope, mask=m_h[None, :])


@triton.jit
def load_steps(p_steps, Q: tl.constexpr):
    """A chunk's steps, and coarse and fine logarithms [Q]; the factors from the chunk's start to each token [Q], from
    each token to the end [Q], from start to end."""
    i_q = tl.arange(0, Q)
    step, coarse, fine = tl.load(p_steps + i_q), tl.load(p_steps + Q + i_q), tl.load(p_steps + 2 * Q + i_q)
    end_coarse, end_fine = tl.load(p_steps + 2 * Q - 1), tl.load(p_steps + 3 * Q - 1)
    to_end = tl.exp2((end_coarse - coarse) + (end_fine - fine))
    return step, coarse, fine, tl.exp2(coarse), to_end, tl.exp2(end_coarse)


@triton.jit
def decays_between(coarse, fine, TURNED: tl.constexpr, Q: tl.constexpr):
    """The decay from token s to token l, 0 for s > l: [l, s], or [s, l] where `TURNED`."""
    difference = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
    i_q = tl.arange(0, Q)
    if TURNED:
        return tl.exp2(tl.where(i_q[:, None] <= i_q[None, :], -difference, -BORDER))
    return tl.exp2(tl.where(i_q[:, None] >= i_q[None, :], difference, -BORDER))
