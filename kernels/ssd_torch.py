"""The SSD scan in torch operators: the CPU's path. Source: arXiv 2405.21060, sections 6-7.

Chunk by chunk; inside a chunk the masked matrix product of the paper's equation 16. Groups stay groups: B and C are
never repeated for the heads that share them.
Shapes: [B] batch, [T] tokens, [H] heads, [P] head_dim, [G] groups, [R] heads a group, [N] state, [Q] chunk.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .parts import side_by_side
from .tracing import STATE, iterations


class TorchScan(torch.autograd.Function):
    """The chunked scan in batched matrix products, with its backward written out: it keeps the inputs and the
    state at each chunk's start, and recomputes the rest."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, dt_bias, initial_state, seq_idx, dt_softplus, dt_limit, chunk_size):
        inputs, options = (x, dt, A, B, C, D, dt_bias, initial_state, seq_idx), (dt_softplus, dt_limit, chunk_size)
        y, state, starts = torch_scan(*inputs, *options, keep_starts=any(ctx.needs_input_grad))
        ctx.save_for_backward(*inputs, *starts)
        ctx.options = options
        return y, state

    @staticmethod
    def backward(ctx, dy, dfinal):
        saved = ctx.saved_tensors  # once: activation checkpointing gives them a single time
        return *torch_scan_backward(dy, dfinal, saved[9:], *saved[:9], *ctx.options), *[None] * 4


def torch_scan(
    x, dt, A, B, C, D, dt_bias, initial_state, seq_idx, dt_softplus, dt_limit, chunk_size, *, keep_starts
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """y [B, T, H, P], the last state [B, H, P, N], and the states [B, G, R, P, N] at the chunks' starts if kept."""
    scan = Chunks(x, dt, A, B, C, D, dt_bias, seq_idx, dt_softplus, dt_limit, chunk_size)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    state = scan.empty_state() if initial_state is None else scan.group_state(initial_state).clone()
    starts = []
    for start, stop in scan.spans if keep_starts else iterations(scan.spans):
        if keep_starts:
            starts.append(state)
        y_chunk, state = scan.forward_chunk(start, stop, state)
        y[:, start:stop] = y_chunk
    return y, state.reshape(x.shape[0], x.shape[2], x.shape[3], B.shape[3]), starts


def torch_scan_backward(
    dy, dfinal, starts, x, dt, A, B, C, D, dt_bias, initial_state, seq_idx, dt_softplus, dt_limit, chunk_size
) -> tuple[Tensor | None, ...]:
    """Gradients of x, dt, A, B, C, D, dt_bias and initial_state, None for what is not there."""
    scan = Chunks(x, dt, A, B, C, D, dt_bias, seq_idx, dt_softplus, dt_limit, chunk_size)
    dx, dB, dC = side_by_side(x, B, C)
    dstep = torch.empty(dt.shape, dtype=scan.dtype, device=x.device)
    da = torch.empty_like(dstep)
    dD = torch.zeros(scan.heads, dtype=scan.dtype, device=x.device)
    dstate = scan.group_state(dfinal)
    for (start, stop), state in iterations([*zip(scan.spans, starts, strict=True)][::-1]):
        dy_chunk = dy[:, start:stop].to(scan.dtype)
        chunk = scan.backward_chunk(start, stop, state, dy_chunk, dstate)
        dx_chunk, dstep[:, start:stop], da[:, start:stop], dB[:, start:stop], dC[:, start:stop], dstate = chunk
        if scan.D is not None:
            dx_chunk = torch.addcmul(dx_chunk, dy_chunk, scan.D[:, None])
            dD += torch.einsum("bthp,bthp->h", dy_chunk, x[:, start:stop].to(scan.dtype))
        dx[:, start:stop] = dx_chunk
    dA = torch.einsum("bth,bth->h", da, scan.step)
    ddt = scan.step_gradient(dstep.addcmul_(da, scan.A))
    return (
        dx,
        ddt.to(dt.dtype),
        dA.to(A.dtype),
        dB,
        dC,
        None if D is None else dD.to(D.dtype),
        None if dt_bias is None else ddt.sum((0, 1)).to(dt_bias.dtype),
        None if initial_state is None else dstate.reshape(initial_state.shape).to(initial_state.dtype),
    )


class Chunks:
    """One scan's inputs, and what happens in a chunk of it. Heads are laid out [G, R], states [B, G, R, P, N]."""

    def __init__(self, x, dt, A, B, C, D, dt_bias, seq_idx, dt_softplus, dt_limit, chunk_size) -> None:
        self.dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.x, self.B, self.C = x, B, C
        self.batch, tokens, self.heads, self.head_dim = x.shape
        self.groups, self.state = B.shape[2:]
        self.per_group = self.heads // self.groups
        self.A = A.to(self.dtype)
        self.D = None if D is None else D.to(self.dtype)
        raw = dt.to(self.dtype)
        self.raw = raw if dt_bias is None else raw + dt_bias.to(self.dtype)
        self.dt_softplus, self.dt_limit = dt_softplus, dt_limit
        self.unclamped = F.softplus(self.raw) if dt_softplus else self.raw
        self.step = self.unclamped if dt_limit == (0.0, math.inf) and dt_softplus else self.unclamped.clamp(*dt_limit)
        self.chunk = min(chunk_size, tokens)
        self.spans = [(start, min(start + self.chunk, tokens)) for start in range(0, tokens, self.chunk)]
        # float64: differences of these sums are what counts, and one large step must not blur the small ones.
        self.a = self.step.double() * self.A.double()
        # Documents numbered along each row, where a chunk has a boundary; elsewhere there is nothing to mask.
        self.document = None if seq_idx is None else document_numbers(seq_idx)
        self.mixed = [False] * len(self.spans)
        if self.document is not None:
            ends = [max(start - 1, 0) for start, _ in self.spans], [stop - 1 for _, stop in self.spans]
            mixed = (self.document[:, ends[0]] != self.document[:, ends[1]]).any(0)
            self.mixed = [True] * len(self.spans) if STATE.on else mixed.tolist()

    def empty_state(self) -> Tensor:
        shape = (self.batch, self.groups, self.per_group, self.head_dim, self.state)
        return torch.zeros(shape, dtype=self.dtype, device=self.x.device)

    def group_state(self, state: Tensor) -> Tensor:
        """[B, H, P, N] -> [B, G, R, P, N]"""
        shape = (self.batch, self.groups, self.per_group, self.head_dim, self.state)
        return state.to(self.dtype).reshape(shape)

    def step_gradient(self, dstep: Tensor) -> Tensor:
        """The gradient of the step, carried back through clamp and softplus to dt + dt_bias."""
        low, high = self.dt_limit
        if low > 0 or high < math.inf or not self.dt_softplus:
            dstep = dstep * ((self.unclamped >= low) & (self.unclamped <= high))
        return dstep * torch.sigmoid(self.raw) if self.dt_softplus else dstep

    def decays(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The chunk's decay factors: between tokens L [B, H, Q, Q] (0 above the diagonal and across documents),
        from the chunk's start to each token [B, H, Q], from each token to the end [B, H, Q], end to end [B, H]."""
        cumulative = self.a[:, start:stop].transpose(1, 2).cumsum(-1)  # [B, H, Q]
        between = (cumulative[..., :, None] - cumulative[..., None, :]).to(self.dtype)
        # Above the diagonal the differences are positive: capped, lest exp overflow, then cut off.
        between.clamp_(max=0).exp_().tril_()
        from_start = cumulative.to(self.dtype, copy=True).exp_()
        to_end = (cumulative[..., -1:] - cumulative).to(self.dtype).exp_()
        if self.document is not None and self.mixed[start // self.chunk]:
            document = self.document[:, start:stop]
            before = self.document[:, max(start - 1, 0)]
            between.masked_fill_((document[:, :, None] != document[:, None, :])[:, None], 0)
            from_start.masked_fill_((document != before[:, None])[:, None], 0)
            to_end.masked_fill_((document != document[:, -1:])[:, None], 0)
        return between, from_start, to_end, from_start[..., -1]

    def inputs(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The chunk as matrices: x [B, H, Q, P], step [B, H, Q], x * step [B, H, Q, P], B and C [B, G, Q, N]."""
        x = self.x[:, start:stop].to(self.dtype).transpose(1, 2)
        step = self.step[:, start:stop].transpose(1, 2)
        B = self.B[:, start:stop].to(self.dtype).transpose(1, 2)
        C = self.C[:, start:stop].to(self.dtype).transpose(1, 2)
        return x, step, x * step[..., None], B, C

    def grouped(self, per_head: Tensor) -> Tensor:
        """[B, H, ...] -> [B, G, R, ...]"""
        return per_head.unflatten(1, (self.groups, self.per_group))

    def rows(self, per_head: Tensor) -> Tensor:
        """[B, H, Q, P] -> [B, G, R P, Q]: a group's heads side by side, so that B and C serve all of them at once."""
        return self.grouped(per_head).transpose(-1, -2).flatten(2, 3)

    def forward_chunk(self, start: int, stop: int, state: Tensor) -> tuple[Tensor, Tensor]:
        """(y [B, Q, H, P], the state after the chunk) from the state before it."""
        between, from_start, to_end, whole = self.decays(start, stop)
        x, _, x_step, B, C = self.inputs(start, stop)
        # 1. Inside the chunk: y = (L o C B^T) (dt x).
        mixing = self.grouped(between).mul_((C @ B.mT)[:, :, None]).flatten(1, 2)
        y = mixing @ x_step
        # 2. What the state before the chunk adds: each token reads it through C, decayed from the chunk's start.
        carried = state.flatten(2, 3) @ C.mT  # [B, G, R P, Q]
        carried = carried.unflatten(2, (self.per_group, self.head_dim)).flatten(1, 2)  # [B, H, P, Q]
        y.addcmul_(carried.mT, from_start[..., None])
        if self.D is not None:
            y.addcmul_(x, self.D[:, None, None])
        # 3. The state after it.
        added = self.rows(x_step * to_end[..., None]) @ B  # [B, G, R P, N]
        after = torch.addcmul(added.view_as(state), state, self.grouped(whole)[..., None, None])
        return y.transpose(1, 2), after

    def backward_chunk(self, start: int, stop: int, state: Tensor, dy: Tensor, dstate: Tensor) -> tuple[Tensor, ...]:
        """Gradients of the chunk's x (without D), step, a, B, C, and of the state before it.

        dy [B, Q, H, P]; `dstate` [B, G, R, P, N] is the gradient of the state after the chunk. The gradient of
        a_k gathers every path that crosses token k: pairs of tokens around it, start to token, token to end, start
        to end. Each is summed on its own, since differences of row and column sums cancel badly.
        """
        between, from_start, to_end, whole = self.decays(start, stop)
        x, step, x_step, B, C = self.inputs(start, stop)
        dy = dy.transpose(1, 2).contiguous()  # [B, H, Q, P]
        scores = (C @ B.mT)[:, :, None]  # [B, G, 1, Q, Q]
        mixing = (self.grouped(between) * scores).flatten(1, 2)  # [B, H, Q, Q]
        # Inside the chunk.
        dx_step = mixing.mT @ dy
        dmixing = dy @ x_step.mT
        dscores = self.grouped(between.mul_(dmixing)).sum(2)  # [B, G, Q, Q]
        dC, dB = dscores @ B, dscores.mT @ C
        after = torch.ones(stop - start, stop - start, dtype=self.dtype, device=dy.device).triu_()
        crossing = after @ mixing.mul_(dmixing)
        da = crossing.tril_(-1).sum(-1)  # [B, H, Q]: pairs (l >= k, s < k)
        # From the state before the chunk.
        dy_decayed = self.rows(dy * from_start[..., None])  # [B, G, R P, Q]
        dC += dy_decayed.mT @ state.flatten(2, 3)
        carried = (state.flatten(2, 3) @ C.mT).mul_(dy_decayed)
        read = carried.unflatten(2, (self.per_group, self.head_dim)).sum(3).flatten(1, 2)  # [B, H, Q]
        da += read.flip(-1).cumsum(-1).flip(-1)
        # Into the state after it.
        written = (dstate.flatten(2, 3) @ B.mT).unflatten(2, (self.per_group, self.head_dim)).flatten(1, 2).mT
        written = written * to_end[..., None]  # [B, H, Q, P]
        dx_step += written
        dB += self.rows(x_step * to_end[..., None]).mT @ dstate.flatten(2, 3)
        gain = (written * x_step).sum(-1)  # [B, H, Q]
        da[..., 1:] += gain[..., :-1].cumsum(-1)
        dwhole = (state * dstate).sum((-1, -2)).flatten(1, 2) * whole  # [B, H]
        da += dwhole[..., None]
        before = (dy_decayed @ C).view_as(state)
        before.addcmul_(dstate, self.grouped(whole)[..., None, None])
        return (
            (dx_step * step[..., None]).transpose(1, 2),
            (dx_step * x).sum(-1).transpose(1, 2),
            da.transpose(1, 2),
            dB.transpose(1, 2),
            dC.transpose(1, 2),
            before,
        )


def document_numbers(seq_idx: Tensor) -> Tensor:
    """0, 1, 2, ... along each row [B, T]: the number goes up wherever `seq_idx` changes."""
    pairs = seq_idx.shape[1] - 1
    # narrow, not an index: that asks for a CUDA build even where tensors are fake.
    change = seq_idx.narrow(1, 1, pairs) != seq_idx.narrow(1, 0, pairs)
    return F.pad(change.to(torch.int32), (1, 0)).cumsum(1, dtype=torch.int32)
