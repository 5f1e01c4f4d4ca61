"""Every operator as the papers write it, token by token and slowly: the truth that the tests hold the others to.

In the inputs' dtype up to float64, with gradients by autograd. Signatures are those of the fast operators.
Symbols (arXiv 2405.21060): x input of a head, dt step, A decay rate, B input map, C output map, D skip, S state;
[B] batch, [T] tokens, [H] heads, [P] head_dim, [G] groups, [N] state, [C] channels, [K] width, [V] vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .divergence import DIVERGENCES, FORMULAS


def ssd_scan_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y [B, T, H, P], final state [B, H, P, N]): S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T, y_t = S_t C_t + D x_t."""
    batch, tokens, heads, head_dim = x.shape
    groups, width = B.shape[2:]
    state = x.new_zeros(batch, heads, head_dim, width) if initial_state is None else initial_state
    outputs = []
    for t in range(tokens):
        if seq_idx is not None and t > 0:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1]).to(x.dtype)[:, None, None, None]
        step = dt[:, t] if dt_bias is None else dt[:, t] + dt_bias
        step = (F.softplus(step) if dt_softplus else step).clamp(*dt_limit)
        rows = []
        for head in range(heads):
            group = head // (heads // groups)
            decay = torch.exp(step[:, head] * A[head])[:, None, None]
            written = step[:, head, None, None] * x[:, t, head, :, None] * B[:, t, group, None, :]
            rows.append(decay * state[:, head] + written)
        state = torch.stack(rows, 1)
        read = [(state[:, head] @ C[:, t, head // (heads // groups), :, None])[..., 0] for head in range(heads)]
        y = torch.stack(read, 1)
        outputs.append(y if D is None else y + D[:, None] * x[:, t])
    return torch.stack(outputs, 1), state


def causal_conv1d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y [B, T, C], the last K - 1 inputs of the last token's document [B, C, K - 1])."""
    batch, tokens, channels = x.shape
    width = weight.shape[1]
    rows, states = [], []
    for row in range(batch):
        empty = x.new_zeros(channels, width - 1)
        past = empty if initial_state is None else initial_state[row]
        outputs = []
        for t in range(tokens):
            if seq_idx is not None and t > 0 and seq_idx[row, t] != seq_idx[row, t - 1]:
                past = empty
            window = torch.cat((past, x[row, t, :, None]), 1)
            y = (window * weight).sum(1)
            y = y if bias is None else y + bias
            outputs.append(F.silu(y) if activation == "silu" else y)
            past = window[:, 1:]
        rows.append(torch.stack(outputs))
        states.append(past)
    return torch.stack(rows), torch.stack(states)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, n_groups: int = 1) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467, eq. 4), the mean inside each group of channels."""
    normed = [group / torch.sqrt((group * group).mean(-1, keepdim=True) + eps) for group in x.chunk(n_groups, -1)]
    return torch.cat(normed, -1) * weight


def gated_rms_norm_reference(x: Tensor, z: Tensor, weight: Tensor, eps: float, n_groups: int) -> Tensor:
    """x * silu(z), then RMSNorm inside each group of channels."""
    groups = (x * z / (1 + torch.exp(-z))).chunk(n_groups, -1)
    normed = [rms_norm_reference(group, group.new_ones(group.shape[-1]), eps) for group in groups]
    return torch.cat(normed, -1) * weight


def relu2_reference(x: Tensor) -> Tensor:
    """max(x, 0)^2"""
    return torch.where(x > 0, x * x, 0)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up"""
    return gate / (1 + torch.exp(-gate)) * up


def expert_mlp_reference(
    x: Tensor, indices: Tensor, weights: Tensor, up: Tensor, down: Tensor, gate: Tensor | None = None
) -> Tensor:
    """sum_k w_tk down_e(act(up_e x_t)), token by token and choice by choice; shapes as in moe.expert_mlp."""
    outputs = []
    for t in range(len(x)):
        y = torch.zeros_like(x[t])
        for expert, weight in zip(indices[t].tolist(), weights[t], strict=True):
            hidden = up[expert] @ x[t]
            active = relu2_reference(hidden) if gate is None else swiglu_reference(gate[expert] @ x[t], hidden)
            y = y + weight * (down[expert] @ active)
        outputs.append(y)
    return torch.stack(outputs)


def rotary_reference(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """x [B, T, H, D] at positions [B, T], each pair of channels (i, i + D / 2) a complex number that is turned
    (arXiv 2104.09864, eq. 34)."""
    half = x.shape[-1] // 2
    turned = x.clone()
    for i in range(half):
        angle = positions[..., None].to(x.dtype) * theta ** (-2 * i / x.shape[-1])
        pair = torch.complex(x[..., i], x[..., i + half]) * torch.polar(torch.ones_like(angle), angle)
        turned[..., i], turned[..., i + half] = pair.real, pair.imag
    return turned


def linear_kl_reference(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    temperature: float = 1.0,
    divergence: str = "forward",
    labels: Tensor | None = None,
    ignore_index: int = -100,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    normalizer: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss, divergence of each token [T]) from dense logits; ignored tokens count for nothing."""
    logits, target = student_hidden @ student_head.T, (teacher_hidden @ teacher_head.T).detach()
    formula = FORMULAS[DIVERGENCES[divergence]]
    student, teacher = (logits / temperature, target / temperature)
    if not formula.of_logits:
        student, teacher = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    kl = formula.reference(student, teacher)
    weights = torch.ones_like(kl)
    cross_entropy = torch.zeros_like(kl)
    if labels is not None:
        weights = weights * (labels != ignore_index)
        cross_entropy = -F.log_softmax(logits, -1).gather(1, labels.clamp_min(0)[:, None])[:, 0]
    total = weights.sum() if normalizer is None else normalizer
    loss = (weights * (kl_weight * temperature**2 * kl + ce_weight * cross_entropy)).sum() / total
    return loss, kl.detach() * (weights != 0)
