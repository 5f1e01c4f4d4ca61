"""How much the indices of the SSM state do, in chunks: what each adds to the output now, or to all outputs to come.

With S_t the state after token t of head h, decays a_t = dt_t A, and q over the tokens from t on of t's document,

    now:     e_t[n]^2 = sum over h, p of  S_t[h, p, n]^2 C_t[n]^2
    to come: e_t[n]^2 = sum over h, p of  S_t[h, p, n]^2 sum over q of exp(2 (a_{t+1} + ... + a_q)) C_q[n]^2

The first is the squared error of y_t without the index, GHOST's pairing of state and reading energy (arXiv 2602.11408).
The second is the product of the diagonals of the controllability and the observability Gramian: what the index's state
at t gives if nothing more is written. No state of a token is held: with x_s dt_s for what token s writes,

    sum over p of S_t[n]^2 = sum over s <= t of exp(2 (a_{s+1} + ... + a_t)) f_s[n]
    f_s[n] = dt_s B_s[n] (2 x_s . S'_s[n] + dt_s |x_s|^2 B_s[n])        S' = the state before s writes, decayed to s

so that matrix products over a chunk do: [Q, Q] and [Q, N] a head.
Shapes: [B] batch, [T] tokens, [H] heads, [P] head_dim, [G] groups, [R] heads a group, [N] state, [Q] chunk.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .ssd_torch import Chunks


@torch.no_grad()
def state_energy(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    to_come: bool,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    chunk_size: int = 128,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """e [B, T, G, N] (see the module) of the arguments of `ssd.ssd_scan`, summed over the heads of each group; float32,
    or float64 for float64 inputs."""
    scan = Chunks(x, dt, A, B, C, None, dt_bias, seq_idx, dt_softplus, dt_limit, chunk_size)
    after = readings_after(scan) if to_come else []
    state = scan.empty_state()
    parts = []
    for number, (start, stop) in enumerate(scan.spans):
        squares = state_squares(scan, start, stop, state)
        readings = scan.C[:, start:stop].to(scan.dtype).transpose(1, 2).square()[:, :, None]  # [B, G, 1, Q, N]
        if to_come:
            between, _, to_end, _ = scan.decays(start, stop)
            inside = scan.grouped(between.square_()).mT @ readings
            readings = inside.addcmul(scan.grouped(to_end.square())[..., None], after[number])
        parts.append((squares * readings).sum(2).clamp_(min=0).sqrt_().transpose(1, 2))
        state = scan.forward_chunk(start, stop, state)[1]
    return torch.cat(parts, 1)


def state_squares(scan: Chunks, start: int, stop: int, state: Tensor) -> Tensor:
    """The sums over head_dim of S_t^2 at the tokens of a chunk, [B, G, R, Q, N], from the state before it."""
    between, from_start, _, _ = scan.decays(start, stop)
    x, step, x_step, B, _ = scan.inputs(start, stop)
    B = B[:, :, None]  # [B, G, 1, Q, N]
    pairs = scan.grouped((x @ x_step.mT).mul_(between).tril_(-1))  # [B, G, R, Q, Q]: s < t
    before = scan.grouped(x * from_start[..., None]) @ state  # [B, G, R, Q, N]
    met = (pairs @ B).add_(before)
    size = scan.grouped(step * x.square().sum(-1))[..., None]
    written = scan.grouped(step)[..., None] * B * (2 * met + size * B)
    own = scan.grouped(between.square_()) @ written
    carried = scan.grouped(from_start.square())[..., None] * state.square().sum(-2, keepdim=True)
    return own.add_(carried).clamp_(min=0)  # what rounds below 0 is 0


def readings_after(scan: Chunks) -> list[Tensor]:
    """For each chunk the sum over the tokens after it of exp(2 (their decays from its end)) C^2, [B, G, R, 1, N]."""
    total = scan.empty_state().sum(-2, keepdim=True)
    found = []
    for start, stop in reversed(scan.spans):
        found.append(total)
        _, from_start, _, whole = scan.decays(start, stop)
        C = scan.C[:, start:stop].to(scan.dtype).transpose(1, 2)[:, :, None]
        own = scan.grouped(from_start.square())[..., None, :] @ C.square()
        total = own.addcmul(scan.grouped(whole.square())[..., None, None], total)
    return found[::-1]
