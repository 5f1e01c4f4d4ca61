"""One decoding step of the SSM state in Triton: a program for each (sequence, head, slice of head_dim).

Names: p_ pointer, i_ index, m_ mask, s_ stride; letters as in `state_update`.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, power_of_two, strides
from .ssd_steps_triton import softplus


@triton.jit(do_not_specialize=["limit_low", "limit_high"])
def update_kernel(
    p_state, p_x, p_dt, p_A, p_B, p_C, p_D, p_bias, p_y, limit_low, limit_high,
    s_state_b, s_state_h, s_state_p, s_state_n, s_x_b, s_x_h, s_x_p, s_dt_b, s_dt_h,
    s_B_b, s_B_g, s_B_n, s_C_b, s_C_g, s_C_n,
    HEADS: tl.constexpr, PER_GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr, SOFTPLUS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (slices of head_dim, heads, batch)."""
    i_h, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i_g = i_h // PER_GROUP
    i_p, i_n = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    m_p, m_n = i_p < P, i_n < N
    m_state = m_p[:, None] & m_n[None, :]
    p_tile = p_state + i_b * s_state_b + i_h * s_state_h + i_p[:, None] * s_state_p + i_n[None, :] * s_state_n
    step = tl.load(p_dt + i_b * s_dt_b + i_h * s_dt_h).to(tl.float32)
    if p_bias is not None:
        step += tl.load(p_bias + i_h).to(tl.float32)
    if SOFTPLUS:
        step = softplus(step)
    step = tl.minimum(tl.maximum(step, limit_low), limit_high)
    decay = tl.exp(step * tl.load(p_A + i_h).to(tl.float32))
    x = tl.load(p_x + i_b * s_x_b + i_h * s_x_h + i_p * s_x_p, mask=m_p, other=0.0).to(tl.float32)
    B = tl.load(p_B + i_b * s_B_b + i_g * s_B_g + i_n * s_B_n, mask=m_n, other=0.0).to(tl.float32)
    C = tl.load(p_C + i_b * s_C_b + i_g * s_C_g + i_n * s_C_n, mask=m_n, other=0.0).to(tl.float32)
    state = tl.load(p_tile, mask=m_state, other=0.0).to(tl.float32)
    state = state * decay + (x * step)[:, None] * B[None, :]
    tl.store(p_tile, state.to(p_state.dtype.element_ty), mask=m_state)
    y = tl.sum(state * C[None, :], 1)
    if p_D is not None:
        y += tl.load(p_D + i_h).to(tl.float32) * x
    tl.store(p_y + (i_b * HEADS + i_h) * P + i_p, y.to(p_y.dtype.element_ty), mask=m_p)


# For each compute capability: the most elements of a program's tile of the state, and warps. Each thread of the first
# has 8 float32 loads of 16 bytes under way, which the slower memory of the others does not need.
SIZES = {80: (4096, 4), 86: (2048, 4), 89: (2048, 4), 90: (4096, 4), 100: (4096, 4), 120: (2048, 4)}


def state_tile(head_dim: int, width: int, elements: int, warps: int) -> tuple[int, int]:
    """Channels and state indices of a program's tile of a head's state [head_dim, width], about so many elements."""
    block_n = power_of_two(width)
    # Slices that waste nothing where 16 divides head_dim: 80 is 5 x 16.
    block_p = min(max(1, elements // block_n), max(math.gcd(head_dim, 128), min(16, power_of_two(head_dim))))
    # A smaller tile would lie in several threads at once, which may read what another has written already.
    return max(block_p, 32 * warps // block_n), block_n


def update_launch(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    options: tuple[bool, float, float], y: Tensor, device: int,
) -> Launch:  # fmt: skip
    """y [B, H, P]; `options` are dt_softplus and the limits of the step."""
    batch, heads, head_dim = x.shape
    groups, width = B.shape[1:]
    elements, warps = SIZES[device]
    block_p, block_n = state_tile(head_dim, width, elements, warps)
    arguments: dict[str, Any] = {
        "p_state": state, "p_x": x, "p_dt": dt, "p_A": A, "p_B": B, "p_C": C, "p_D": D, "p_bias": dt_bias,
        "p_y": y, "limit_low": options[1], "limit_high": options[2],
        **strides("state", "bhpn", state), **strides("x", "bhp", x), **strides("dt", "bh", dt),
        **strides("B", "bgn", B), **strides("C", "bgn", C),
        "HEADS": heads, "PER_GROUP": heads // groups, "P": head_dim, "N": width, "SOFTPLUS": options[0],
        "BLOCK_P": block_p, "BLOCK_N": block_n,
    }  # fmt: skip
    return Launch(update_kernel, (-(-head_dim // block_p), heads, batch), arguments, warps, 1)
