"""A Mamba-2 mixer's decoding step between its two projections in Triton, in one launch: convolution, state update and
gated norm.

A program takes a slice of a head's state, as in `state_triton`; it convolves the slice's channels, and B and C of its
group, which all programs of the group do alike. What needs all of them is done by the one that comes last, as a counter
tells: it moves the columns of B and C on, which nobody reads any more, and norms the group's channels. Nobody waits for
another, and sums have an order that does not depend on who is last.
Names: p_ pointer, i_ index, m_ mask, s_ stride; letters as in `mamba_step`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .conv_triton import load_tap, logistic
from .launch import Launch, power_of_two, strides
from .ssd_steps_triton import softplus
from .state_triton import state_tile

# On every device: the most elements of a program's tile of the state, the most channels where these leave the choice,
# and warps. What a warp computes again of its group's B and C and of the step counts for little beside 64 elements a
# thread; four warps would do all of it four times.
ELEMENTS, ROWS, WARPS = 2048, 16, 1
MOST_NORMED = 2048  # channels that the last program of a group has in registers at a time


@triton.jit
def load_inputs(p_state, p_u, i_c, m_c, s_state_c, s_state_k, WIDTH: tl.constexpr):
    """What a step reads of channels, the newest input first; of those that a width below 4 leaves out, the newest."""
    now = tl.load(p_u + i_c, mask=m_c, other=0.0).to(p_state.dtype.element_ty)
    p_state += i_c * s_state_c
    one, two, three = tl.load(p_state + (WIDTH - 2) * s_state_k, mask=m_c, other=0.0), now, now
    if WIDTH > 2:
        two = tl.load(p_state + (WIDTH - 3) * s_state_k, mask=m_c, other=0.0)
    if WIDTH > 3:
        three = tl.load(p_state, mask=m_c, other=0.0)
    return now, one, two, three


@triton.jit
def mix_inputs(now, one, two, three, p_weight, p_bias, i_c, m_c, s_weight_c, s_weight_k, WIDTH: tl.constexpr):
    """What the convolution gives, after SiLU."""
    y = now.to(tl.float32) * load_tap(p_weight, i_c, m_c, 0, s_weight_c, s_weight_k, WIDTH)
    y += one.to(tl.float32) * load_tap(p_weight, i_c, m_c, 1, s_weight_c, s_weight_k, WIDTH)
    if WIDTH > 2:
        y += two.to(tl.float32) * load_tap(p_weight, i_c, m_c, 2, s_weight_c, s_weight_k, WIDTH)
    if WIDTH > 3:
        y += three.to(tl.float32) * load_tap(p_weight, i_c, m_c, 3, s_weight_c, s_weight_k, WIDTH)
    if p_bias is not None:
        y += tl.load(p_bias + i_c, mask=m_c, other=0.0).to(tl.float32)
    return y * logistic(y)


@triton.jit
def store_inputs(now, one, two, p_state, i_c, m_c, s_state_c, s_state_k, WIDTH: tl.constexpr):
    """All but the oldest, for the next step."""
    p_state += i_c * s_state_c
    tl.store(p_state + (WIDTH - 2) * s_state_k, now, mask=m_c)
    if WIDTH > 2:
        tl.store(p_state + (WIDTH - 3) * s_state_k, one, mask=m_c)
    if WIDTH > 3:
        tl.store(p_state, two, mask=m_c)


@triton.jit(do_not_specialize=["limit_low", "limit_high", "eps"])
def mamba_step(
    p_conv, p_ssm, p_arrived, p_z, p_u, p_dt, p_weight, p_bias, p_A, p_D, p_dt_bias, p_norm, p_mixed, p_y,
    limit_low, limit_high, eps,
    s_conv_b, s_conv_c, s_conv_k, s_ssm_b, s_ssm_h, s_ssm_p, s_ssm_n, s_z_b, s_u_b, s_dt_b, s_weight_c, s_weight_k,
    HEADS: tl.constexpr, PER_GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr,
    NORM_FIRST: tl.constexpr, BLOCK_P: tl.constexpr, SPREAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Grid (slices of head_dim, heads, batch). `p_mixed` [batch, heads, P] takes what the norm reads, in float32."""
    GROUPS: tl.constexpr = HEADS // PER_GROUP
    SIZE: tl.constexpr = PER_GROUP * P
    i_h, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_g = i_h // PER_GROUP
    i_p, i_n = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    m_p, m_n = i_p < P, i_n < N
    m_state = m_p[:, None] & m_n[None, :]
    p_tile = p_ssm + i_b * s_ssm_b + i_h.to(tl.int64) * s_ssm_h + i_p[:, None] * s_ssm_p + i_n[None, :] * s_ssm_n
    state = tl.load(p_tile, mask=m_state, other=0.0).to(tl.float32)  # first: the most bytes, and nothing to wait for

    # 1. The convolution of the slice's channels of x, and of the group's B and C. So that a thread has at most one
    # channel of x, and not those of all rows of the state that it holds, there are as many as threads, most masked.
    p_conv += i_b * s_conv_b
    p_u += i_b * s_u_b
    i_y = i_h * P + i_p
    i_slice = tl.program_id(0) * BLOCK_P + tl.arange(0, SPREAD * BLOCK_P)
    m_x = i_slice < tl.minimum(tl.program_id(0) * BLOCK_P + BLOCK_P, P)
    i_x = i_h * P + i_slice
    i_B = HEADS * P + i_g * N + i_n
    i_C = i_B + GROUPS * N
    x0, x1, x2, x3 = load_inputs(p_conv, p_u, i_x, m_x, s_conv_c, s_conv_k, WIDTH)
    B0, B1, B2, B3 = load_inputs(p_conv, p_u, i_B, m_n, s_conv_c, s_conv_k, WIDTH)
    C0, C1, C2, C3 = load_inputs(p_conv, p_u, i_C, m_n, s_conv_c, s_conv_k, WIDTH)
    x = mix_inputs(x0, x1, x2, x3, p_weight, p_bias, i_x, m_x, s_weight_c, s_weight_k, WIDTH)
    x = tl.sum(tl.reshape(x, [SPREAD, BLOCK_P]), 0)
    B = mix_inputs(B0, B1, B2, B3, p_weight, p_bias, i_B, m_n, s_weight_c, s_weight_k, WIDTH)
    C = mix_inputs(C0, C1, C2, C3, p_weight, p_bias, i_C, m_n, s_weight_c, s_weight_k, WIDTH)

    # 2. The recurrence.
    step = softplus(tl.load(p_dt + i_b * s_dt_b + i_h).to(tl.float32) + tl.load(p_dt_bias + i_h).to(tl.float32))
    step = tl.minimum(tl.maximum(step, limit_low), limit_high)
    state = state * tl.exp(step * tl.load(p_A + i_h).to(tl.float32)) + (x * step)[:, None] * B[None, :]
    tl.store(p_tile, state.to(p_ssm.dtype.element_ty), mask=m_state)
    y = tl.sum(state * C[None, :], 1) + tl.load(p_D + i_h).to(tl.float32) * x

    # 3. The gate, unless the norm comes first.
    if not NORM_FIRST:
        z = tl.load(p_z + i_b * s_z_b + i_y, mask=m_p, other=0.0).to(tl.float32)
        y *= z * logistic(z)
    o_y = i_b * (HEADS * P)
    if p_norm is None:
        tl.store(p_y + o_y + i_y, y.to(p_y.dtype.element_ty), mask=m_p)
    else:
        tl.store(p_mixed + o_y + i_y, y, mask=m_p)

    # 4. All threads have read their columns and written their share before the program counts as arrived.
    tl.debug_barrier()
    store_inputs(x0, x1, x2, p_conv, i_x, m_x, s_conv_c, s_conv_k, WIDTH)
    p_arrived += i_b * GROUPS + i_g
    arrived = tl.atomic_add(p_arrived, 1, sem="acq_rel", scope="gpu")
    if arrived == tl.num_programs(0) * PER_GROUP - 1:
        tl.store(p_arrived, 0)  # for the next step
        store_inputs(B0, B1, B2, p_conv, i_B, m_n, s_conv_c, s_conv_k, WIDTH)
        store_inputs(C0, C1, C2, p_conv, i_C, m_n, s_conv_c, s_conv_k, WIDTH)
        if p_norm is not None:
            squares = tl.zeros([BLOCK_S], tl.float32)
            for start in range(0, SIZE, BLOCK_S):
                i_s = start + tl.arange(0, BLOCK_S)
                # From the L2: others than this multiprocessor's have written it.
                v = tl.load(p_mixed + o_y + i_g * SIZE + i_s, mask=i_s < SIZE, other=0.0, cache_modifier=".cg")
                squares += v * v
            inverse = tl.rsqrt(tl.sum(squares, 0) / SIZE + eps)
            for start in range(0, SIZE, BLOCK_S):
                i_s = start + tl.arange(0, BLOCK_S)
                i_c, m_s = i_g * SIZE + i_s, i_s < SIZE
                v = tl.load(p_mixed + o_y + i_c, mask=m_s, other=0.0, cache_modifier=".cg")
                v *= inverse * tl.load(p_norm + i_c, mask=m_s, other=0.0).to(tl.float32)
                if NORM_FIRST:
                    z = tl.load(p_z + i_b * s_z_b + i_c, mask=m_s, other=0.0).to(tl.float32)
                    v *= z * logistic(z)
                tl.store(p_y + o_y + i_c, v.to(p_y.dtype.element_ty), mask=m_s)


def step_launch(
    conv: Tensor, ssm: Tensor, arrived: Tensor, inputs: Sequence[Tensor], weights: Mapping[str, Tensor | None],
    options: tuple[float, float, float, bool], mixed: Tensor | None, y: Tensor,
) -> Launch:  # fmt: skip
    """y [B, H P]; `inputs` are z, what the convolution reads and dt, neighbouring columns side by side; `weights` those
    named weight, bias, A, D, dt_bias and norm; `options` the limits of the step, eps, and whether the norm comes first.
    """
    (z, u, dt), (low, high, eps, norm_first) = inputs, options
    _, heads, head_dim, state = ssm.shape
    batch, groups = arrived.shape
    block_p, block_n = state_tile(head_dim, state, min(ELEMENTS, ROWS * power_of_two(state)), WARPS)
    weight = weights["weight"]
    assert weight is not None
    arguments: dict[str, Any] = {
        "p_conv": conv, "p_ssm": ssm, "p_arrived": arrived, "p_z": z, "p_u": u, "p_dt": dt,
        **{f"p_{name}": tensor for name, tensor in weights.items()}, "p_mixed": mixed, "p_y": y,
        "limit_low": low, "limit_high": high, "eps": eps,
        **strides("conv", "bck", conv), **strides("ssm", "bhpn", ssm), **strides("weight", "ck", weight),
        "s_z_b": z.stride(0), "s_u_b": u.stride(0), "s_dt_b": dt.stride(0),
        "HEADS": heads, "PER_GROUP": heads // groups, "P": head_dim, "N": state, "WIDTH": weight.shape[1],
        "NORM_FIRST": norm_first, "BLOCK_P": block_p, "SPREAD": max(1, 32 * WARPS // block_p), "BLOCK_N": block_n,
        "BLOCK_S": min(power_of_two(heads // groups * head_dim), MOST_NORMED),
    }  # fmt: skip
    return Launch(mamba_step, (-(-head_dim // block_p), heads, batch), arguments, WARPS, 1)
