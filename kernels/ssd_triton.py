"""The SSD scan in Triton, without atomics. Source: arXiv 2405.21060, sections 6-7; the recurrence stands in `ssd`.

Steps and decays are noted by a pass before (`ssd_steps_triton`). `scan_forward`, one launch: a program for each
(sequence, head, slice of head_dim) walks the chunks in order, the float32 state in registers. Backward, three:
`scan_walk` notes the state at each chunk's start, then in reverse the gradient of the state at each chunk's end;
`scan_gradients`, a program for each (chunk, group, share of its heads), does the rest, so that gradients of B and C are
summed over heads in registers.
Names: p_ pointer, i_ index, m_ mask, s_ stride; letters as in `ssd`; shapes stand above the dots.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .ssd_steps_triton import decays_between, load_steps


@triton.jit
def forward_tile(
    p_x, p_y, s_x_t, s_x_p, i_p, mixing, B, C, state, from_start, written, whole, D, inside,
    WIDTH: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one slice of head_dim: stores y, and gives the state [N, p] after it."""
    i_q = tl.arange(0, Q)
    mask = inside[:, None] & (i_p < P)[None, :]
    x = tl.load(p_x + i_q[:, None] * s_x_t + i_p[None, :] * s_x_p, mask=mask, other=0.0)
    # [Q, N] x [N, p], what the state before the chunk adds; then [Q, Q] x [Q, p], what the chunk itself does
    y = tl.dot(C, state.to(DOT), input_precision=PRECISION) * from_start[:, None]
    y = tl.dot(mixing, x.to(DOT), y, input_precision=PRECISION) + D * x.to(tl.float32)
    tl.store(p_y + i_q[:, None] * WIDTH + i_p[None, :], y.to(p_y.dtype.element_ty), mask=mask)
    x_end = (x.to(tl.float32) * written[:, None]).to(DOT)
    return tl.dot(tl.trans(B), x_end, state * whole, input_precision=PRECISION)  # [N, Q] x [Q, p]


@triton.jit
def turned_tile(
    p_x, p_y, s_x_t, s_x_p, i_p, mixing, B, C, state, from_start, written, whole, D, inside,
    WIDTH: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `forward_tile`, all transposed: mixing from token s to l is [s, l], the state [p, N], which is a factor of its
    product as it lies in registers; warps share out head_dim."""
    i_q = tl.arange(0, Q)
    mask = inside[:, None] & (i_p < P)[None, :]
    x = tl.load(p_x + i_q[:, None] * s_x_t + i_p[None, :] * s_x_p, mask=mask, other=0.0)
    # [p, N] x [N, Q]; [p, Q] x [Q, Q]
    y = tl.dot(state.to(DOT), tl.trans(C), input_precision=PRECISION) * from_start[None, :]
    y = tl.dot(tl.trans(x.to(DOT)), mixing, y, input_precision=PRECISION)
    y = tl.trans(y) + D * x.to(tl.float32)
    tl.store(p_y + i_q[:, None] * WIDTH + i_p[None, :], y.to(p_y.dtype.element_ty), mask=mask)
    x_end = (x.to(tl.float32) * written[:, None]).to(DOT)
    return tl.dot(tl.trans(x_end), B, state * whole, input_precision=PRECISION)  # [p, Q] x [Q, N]


@triton.jit(do_not_specialize=["tokens"])
def scan_forward(
    p_steps, p_x, p_B, p_C, p_D, p_first, p_y, p_last, tokens,
    s_x_b, s_x_t, s_x_h, s_x_p, s_B_b, s_B_t, s_B_g, s_B_n, s_C_b, s_C_t, s_C_g, s_C_n,
    HEADS: tl.constexpr, PER_GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PLANES: tl.constexpr,
    Q: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, BLOCK_N: tl.constexpr, TURNED: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (slices of head_dim, heads, batch). A slice is MAIN + TAIL wide: 64 + 16 covers 80 without waste."""
    i_h, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_g = i_h // PER_GROUP
    p_x += i_b * s_x_b + i_h.to(tl.int64) * s_x_h
    p_steps += (i_b * tl.cdiv(tokens, Q) * HEADS + i_h) * (PLANES * Q)
    p_B += i_b * s_B_b + i_g.to(tl.int64) * s_B_g
    p_C += i_b * s_C_b + i_g.to(tl.int64) * s_C_g
    p_y += i_b * tokens * HEADS * P + i_h * P
    p_last += (i_b * HEADS + i_h) * P * N
    D = 0.0 if p_D is None else tl.load(p_D + i_h).to(tl.float32)
    i_q, i_n = tl.arange(0, Q), tl.arange(0, BLOCK_N)
    o_p = 0 if MAIN + TAIL >= P else tl.program_id(0) * (MAIN + TAIL)
    i_main = o_p + tl.arange(0, MAIN)
    i_tail = o_p + MAIN + tl.arange(0, TAIL if TAIL else 1)
    if TURNED:
        o_main = i_main[:, None] * N + i_n[None, :]
        m_main = (i_main < P)[:, None] & (i_n < N)[None, :]
    else:
        o_main = i_main[None, :] * N + i_n[:, None]
        m_main = (i_main < P)[None, :] & (i_n < N)[:, None]
    o_tail = i_tail[None, :] * N + i_n[:, None]
    m_tail = (i_tail < P)[None, :] & (i_n < N)[:, None]
    if p_first is None:
        main = tl.zeros(o_main.shape, tl.float32)
        tail = tl.zeros((BLOCK_N, TAIL if TAIL else 1), tl.float32)
    else:
        p_first += (i_b * HEADS + i_h) * P * N
        main = tl.load(p_first + o_main, mask=m_main, other=0.0).to(tl.float32)
        tail = tl.load(p_first + o_tail, mask=m_tail, other=0.0).to(tl.float32)
    # Addresses of shared memory computed before the loop would take more registers than there are.
    for start in tl.range(0, tokens, Q, disable_licm=True):
        inside = start + i_q < tokens
        m_n = inside[:, None] & (i_n < N)[None, :]
        step, coarse, fine, from_start, to_end, whole = load_steps(p_steps, Q)
        B = tl.load(p_B + i_q[:, None] * s_B_t + i_n[None, :] * s_B_n, mask=m_n, other=0.0).to(DOT)
        C = tl.load(p_C + i_q[:, None] * s_C_t + i_n[None, :] * s_C_n, mask=m_n, other=0.0).to(DOT)
        written = step * to_end
        if TURNED:
            turned = tl.dot(B, tl.trans(C), input_precision=PRECISION)  # [Q, N] x [N, Q]
            turned = (turned * decays_between(coarse, fine, True, Q) * step[:, None]).to(DOT)
            main = turned_tile(
                p_x, p_y, s_x_t, s_x_p, i_main, turned, B, C, main, from_start, written, whole, D, inside,
                HEADS * P, P, Q, DOT, PRECISION,
            )  # fmt: skip
            mixing = tl.trans(turned)
        else:
            scores = tl.dot(C, tl.trans(B), input_precision=PRECISION)  # [Q, N] x [N, Q]
            mixing = (scores * decays_between(coarse, fine, False, Q) * step[None, :]).to(DOT)
            main = forward_tile(
                p_x, p_y, s_x_t, s_x_p, i_main, mixing, B, C, main, from_start, written, whole, D, inside,
                HEADS * P, P, Q, DOT, PRECISION,
            )  # fmt: skip
        if TAIL:
            tail = forward_tile(
                p_x, p_y, s_x_t, s_x_p, i_tail, mixing, B, C, tail, from_start, written, whole, D, inside,
                HEADS * P, P, Q, DOT, PRECISION,
            )  # fmt: skip
        p_x += tl.cast(s_x_t, tl.int64) * Q
        p_steps += HEADS * PLANES * Q
        p_B += tl.cast(s_B_t, tl.int64) * Q
        p_C += tl.cast(s_C_t, tl.int64) * Q
        p_y += HEADS * P * Q
    tl.store(p_last + o_main, main, mask=m_main)
    if TAIL:
        tl.store(p_last + o_tail, tail, mask=m_tail)


@triton.jit(do_not_specialize=["tokens"])
def scan_walk(
    p_steps, p_u, p_v, p_first, p_states, p_last, tokens,
    s_u_b, s_u_t, s_u_h, s_u_p, s_v_b, s_v_t, s_v_g, s_v_n,
    HEADS: tl.constexpr, PER_GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PLANES: tl.constexpr,
    REVERSE: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The states alone. Forwards u, v are x, B, and each chunk's state at its start is noted; in reverse they are
    dy, C, and the gradient of each chunk's state at its end is noted. Grid (slices of head_dim, heads, batch)."""
    i_h, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    p_u += i_b * s_u_b + i_h.to(tl.int64) * s_u_h
    p_v += i_b * s_v_b + (i_h // PER_GROUP).to(tl.int64) * s_v_g
    i_q, i_n = tl.arange(0, Q), tl.arange(0, BLOCK_N)
    i_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_tile = i_p[:, None] * N + i_n[None, :]
    m_tile = (i_p < P)[:, None] & (i_n < N)[None, :]
    if p_first is None:
        state = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    else:
        state = tl.load(p_first + (i_b * HEADS + i_h) * P * N + o_tile, mask=m_tile, other=0.0).to(tl.float32)
    chunks = tl.cdiv(tokens, Q)
    for number in range(chunks):
        chunk = tl.cast(chunks - 1 - number if REVERSE else number, tl.int64)
        start = chunk * Q
        inside = start + i_q < tokens
        o_chunk = (i_b * chunks + chunk) * HEADS + i_h
        tl.store(p_states + o_chunk * P * N + o_tile, state.to(p_states.dtype.element_ty), mask=m_tile)
        step, _coarse, _fine, from_start, to_end, whole = load_steps(p_steps + o_chunk * PLANES * Q, Q)
        factor = from_start if REVERSE else step * to_end
        m_u = inside[:, None] & (i_p < P)[None, :]
        m_v = inside[:, None] & (i_n < N)[None, :]
        u = tl.load(p_u + start * s_u_t + i_q[:, None] * s_u_t + i_p[None, :] * s_u_p, mask=m_u, other=0.0).to(DOT)
        v = tl.load(p_v + start * s_v_t + i_q[:, None] * s_v_t + i_n[None, :] * s_v_n, mask=m_v, other=0.0)
        v = (v.to(tl.float32) * factor[:, None]).to(DOT)
        state = tl.dot(tl.trans(u), v, state * whole, input_precision=PRECISION)  # [p, Q] x [Q, N]
    if p_last is not None:
        tl.store(p_last + (i_b * HEADS + i_h) * P * N + o_tile, state.to(p_last.dtype.element_ty), mask=m_tile)


@triton.jit(do_not_specialize=["tokens"])
def scan_gradients(
    p_steps, p_x, p_A, p_B, p_C, p_D, p_dy, p_states, p_dstates, p_dx, p_ddt, p_dB, p_dC, p_sums, tokens,
    s_x_b, s_x_t, s_x_h, s_x_p, s_B_b, s_B_t, s_B_g, s_B_n, s_C_b, s_C_t, s_C_g, s_C_n, s_dy_b, s_dy_t, s_dy_h, s_dy_p,
    HEADS: tl.constexpr, PER_GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PLANES: tl.constexpr,
    SHARES: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk from the state at its start and the gradient of the state at its end. Grid (chunks,
    groups x shares of a group's heads, batch); dB and dC have a leading dimension of shares, and `p_sums`
    [3, batch, chunks, heads] takes the sums over tokens for A, dt_bias and D."""
    chunk, i_b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    i_g, share = tl.program_id(1) // SHARES, tl.program_id(1) % SHARES
    start = chunk * Q
    i_q, i_n = tl.arange(0, Q), tl.arange(0, BLOCK_N)
    inside = start + i_q < tokens
    m_n = inside[:, None] & (i_n < N)[None, :]
    p_B += i_b * s_B_b + start * s_B_t + i_g.to(tl.int64) * s_B_g
    p_C += i_b * s_C_b + start * s_C_t + i_g.to(tl.int64) * s_C_g
    B = tl.load(p_B + i_q[:, None] * s_B_t + i_n[None, :] * s_B_n, mask=m_n, other=0.0).to(DOT)
    C = tl.load(p_C + i_q[:, None] * s_C_t + i_n[None, :] * s_C_n, mask=m_n, other=0.0).to(DOT)
    scores = tl.dot(C, tl.trans(B), input_precision=PRECISION)  # [Q, N] x [N, Q]
    dscores = tl.zeros((Q, Q), tl.float32)
    dB = tl.zeros((Q, BLOCK_N), tl.float32)
    dC = tl.zeros((Q, BLOCK_N), tl.float32)
    for number in tl.range(0, PER_GROUP // SHARES, disable_licm=True):
        i_h = (i_g * PER_GROUP + share * (PER_GROUP // SHARES) + number).to(tl.int64)
        A = tl.load(p_A + i_h).to(tl.float32)
        D = 0.0 if p_D is None else tl.load(p_D + i_h).to(tl.float32)
        o_chunk = (i_b * tl.num_programs(0) + chunk) * HEADS + i_h
        p_steps_h = p_steps + o_chunk * PLANES * Q
        step, coarse, fine, from_start, to_end, whole = load_steps(p_steps_h, Q)
        between = decays_between(coarse, fine, False, Q)
        mixing = tl.trans((scores * between).to(DOT))
        dmixing = tl.zeros((Q, Q), tl.float32)
        read = tl.zeros((Q, BLOCK_N), tl.float32)
        # Products whose sums are wanted are added up as tiles: a sum over threads costs barriers.
        gains, dsteps = tl.zeros((Q, BLOCK_P), tl.float32), tl.zeros((Q, BLOCK_P), tl.float32)
        skipped, kept = tl.zeros((Q, BLOCK_P), tl.float32), tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
        p_x_h = p_x + i_b * s_x_b + start * s_x_t + i_h * s_x_h
        p_dy_h = p_dy + i_b * s_dy_b + start * s_dy_t + i_h * s_dy_h
        o_states = o_chunk * P * N
        o_dx = ((i_b * tokens + start) * HEADS + i_h) * P
        for o_p in tl.range(0, P, BLOCK_P, disable_licm=True):
            i_p = o_p + tl.arange(0, BLOCK_P)
            m_x = inside[:, None] & (i_p < P)[None, :]
            m_state = (i_p < P)[:, None] & (i_n < N)[None, :]
            x = tl.load(p_x_h + i_q[:, None] * s_x_t + i_p[None, :] * s_x_p, mask=m_x, other=0.0).to(DOT)
            dy = tl.load(p_dy_h + i_q[:, None] * s_dy_t + i_p[None, :] * s_dy_p, mask=m_x, other=0.0).to(DOT)
            o_tile = o_states + i_p[:, None] * N + i_n[None, :]
            state = tl.load(p_states + o_tile, mask=m_state, other=0.0).to(DOT)
            dstate = tl.load(p_dstates + o_tile, mask=m_state, other=0.0).to(DOT)
            x32, dy32 = x.to(tl.float32), dy.to(tl.float32)
            dmixing = tl.dot(dy, tl.trans(x), dmixing, input_precision=PRECISION)  # [Q, p] x [p, Q]
            read = tl.dot(dy, state, read, input_precision=PRECISION)  # [Q, p] x [p, N]
            # [Q, N] x [N, p]: what each token's write into the state is worth; then [Q, Q] x [Q, p]
            written = tl.dot(B, tl.trans(dstate), input_precision=PRECISION) * to_end[:, None]
            gains += written * x32
            dx = tl.dot(mixing, dy, written, input_precision=PRECISION)
            dsteps += dx * x32
            skipped += dy32 * x32
            kept += state.to(tl.float32) * dstate.to(tl.float32)
            x_end = (x32 * (step * to_end)[:, None]).to(DOT)
            dB = tl.dot(x_end, dstate, dB, input_precision=PRECISION)  # [Q, p] x [p, N]
            dx = dx * step[:, None] + D * dy32
            o_x = o_dx + i_q[:, None] * (HEADS * P) + i_p[None, :]
            tl.store(p_dx + o_x, dx.to(p_dx.dtype.element_ty), mask=m_x)
        gain, dstep = tl.sum(gains, 1), tl.sum(dsteps, 1)
        dwhole = tl.sum(tl.sum(kept, 1), 0)
        read *= from_start[:, None]
        dC += read
        dmixing *= between * step[None, :]
        dscores += dmixing
        # The gradient of a_k gathers every path that crosses token k: pairs of tokens around it, start to token,
        # token to end, start to end. Each is summed on its own, since differences of sums cancel badly.
        crossing = tl.cumsum(dmixing * scores, 0, reverse=True) + (gain * step)[None, :]
        earlier = i_q[None, :] < i_q[:, None]
        da = tl.sum(tl.where(earlier, crossing, 0.0), 1) + dwhole * whole
        da += tl.cumsum(tl.sum(read * C.to(tl.float32), 1), 0, reverse=True)
        dstep += da * A
        dstep = tl.where(inside, dstep * tl.load(p_steps_h + 3 * Q + i_q), 0.0)
        p_ddt_h = p_ddt + (i_b * tokens + start) * HEADS + i_h
        tl.store(p_ddt_h + i_q * HEADS, dstep.to(p_ddt.dtype.element_ty), mask=inside)
        n_sums = tl.cast(tl.num_programs(2), tl.int64) * tl.num_programs(0) * HEADS
        tl.store(p_sums + o_chunk, tl.sum(da * step, 0))
        tl.store(p_sums + n_sums + o_chunk, tl.sum(dstep, 0))
        tl.store(p_sums + 2 * n_sums + o_chunk, tl.sum(tl.sum(skipped, 1), 0))
    dscores = dscores.to(DOT)
    dC = tl.dot(dscores, B, dC, input_precision=PRECISION)  # [Q, Q] x [Q, N]
    dB = tl.dot(tl.trans(dscores), C, dB, input_precision=PRECISION)
    row = (share * tl.num_programs(2) + i_b) * tokens + start
    o_n = (row + i_q[:, None]) * (HEADS // PER_GROUP * N) + i_g * N + i_n[None, :]
    tl.store(p_dB + o_n, dB.to(p_dB.dtype.element_ty), mask=m_n)
    tl.store(p_dC + o_n, dC.to(p_dC.dtype.element_ty), mask=m_n)
