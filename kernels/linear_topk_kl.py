"""Head and loss in one against a teacher of whom only the top-k tokens are known, and the mass of the rest.

The k tokens and the rest in one bucket are a distribution over k + 1 outcomes; forward KL between the teacher's and the
student's. Merging outcomes never adds to a KL (log-sum inequality), so the loss is at most the dense one, and is it at
k = V. Without the bucket the teacher's k are made to add up to one, and every token outside counts as impossible: the
student's tail is pushed to nothing, which is what a tail's mass is kept for. Tokens go through in chunks, as in
linear_kl; all in torch, since what is read beside the products is small.
Shapes: [T] tokens, [V] vocabulary, [H] hidden, [k] top-k tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .fused_loss import ChunkedLoss, Piece
from .linear_kl import IGNORED, check_head, clean, default_chunk, weigh


class TopK(NamedTuple):
    """The top-k tokens [T, k], the argmax first, their log-probabilities [T, k], and the logarithm of what the
    others have together [T] (-inf: nothing)."""

    ids: Tensor
    log_probs: Tensor
    log_tail: Tensor


class LinearTopKKL(NamedTuple):
    """The loss, and per token [T] (no gradient, 0 where ignored): KL over the buckets and cross-entropy in nats (None
    without labels), and whether the student's argmax is the teacher's."""

    loss: Tensor
    kl: Tensor
    cross_entropy: Tensor | None
    agreement: Tensor


@torch.no_grad()
def linear_topk(hidden: Tensor, head: Tensor, k: int, chunk_tokens: int | None = None) -> TopK:
    """The top-k tokens of a model with hidden states [T, H] and a head [V, H]. Buffers are [chunk_tokens, V].

    Raises ValueError where k is not within 1..V.
    """
    check_head("teacher", hidden, head)
    if not 1 <= k <= head.shape[0]:
        raise ValueError(f"linear_topk: k is {k}, expected 1 to the vocabulary's {head.shape[0]}")
    work = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    parts = []
    for rows in hidden.split(chunk_tokens or default_chunk(head.shape[0], hidden)):
        logits = (rows @ head.T).to(work)
        normalizer = torch.logsumexp(logits, -1, keepdim=True)
        values, ids = logits.topk(k, -1)
        tail = torch.logsumexp(logits.scatter_(1, ids, -torch.inf), -1)
        parts.append(TopK(ids, values - normalizer, tail - normalizer[:, 0]))
    return TopK(*(torch.cat(part) for part in zip(*parts, strict=True)))


def linear_topk_kl(
    hidden: Tensor,
    head: Tensor,
    target: TopK,
    *,
    tail: bool = True,
    labels: Tensor | None = None,
    token_weights: Tensor | None = None,
    ignore_index: int = IGNORED,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    normalizer: Tensor | float | None = None,
    chunk_tokens: int | None = None,
) -> LinearTopKKL:
    """Distillation loss of hidden states [T, H] under a head [V, H] against the teacher's top-k tokens.

    loss = sum_t (kl_weight KL_t + ce_weight cross_entropy_t) / normalizer over the tokens whose label [T] is not
    `ignore_index`, each times its `token_weights`; the normalizer is by default their sum. `tail`
    keeps the bucket of the rest. Log-probabilities may be rounded: they are made to add up to one. Gradients reach
    hidden states and head.

    Raises ValueError where shapes disagree.
    """
    check_head("student", hidden, head)
    tokens, k = hidden.shape[0], target.ids.shape[-1]
    if [tuple(part.shape) for part in target] != [(tokens, k), (tokens, k), (tokens,)]:
        raise ValueError(
            f"linear_topk_kl: {tokens} tokens, but ids, log_probs and log_tail are"
            f" {', '.join(str(tuple(part.shape)) for part in target)}; expected [T, k], [T, k] and [T]"
        )
    if ce_weight and labels is None:
        raise ValueError("linear_topk_kl: ce_weight needs labels")
    weights, scale = weigh(tokens, labels, ignore_index, normalizer, hidden, token_weights)
    log_probs, log_tail = (part.to(weights.dtype) for part in target[1:])
    if not tail:
        log_tail = torch.full_like(log_tail, -torch.inf)
    total = torch.logsumexp(torch.cat((log_probs, log_tail[:, None]), 1), 1)
    target = TopK(target.ids, log_probs - total[:, None], log_tail - total)
    kept, cleaned = target, clean(labels, ignore_index)

    def piece(logits: Tensor, inner: slice, outer: slice, values: Tensor, factors: Tensor, need: bool) -> Tensor:
        own = TopK(*(part[outer] for part in kept))
        named = None if cleaned is None else cleaned[outer, None]
        return chunk_loss(logits, own, named, values, factors, (kl_weight, ce_weight), need)

    return answered(hidden, head, (weights, scale), piece, labels, chunk_tokens)


def answered(
    hidden: Tensor, head: Tensor, weighing: tuple[Tensor, Tensor], piece: Piece, labels: Tensor | None,
    chunk_tokens: int | None,
) -> LinearTopKKL:  # fmt: skip
    """The loss against a teacher's answers, of which `piece` makes divergence, cross-entropy and loss of each token."""
    step = chunk_tokens or default_chunk(head.shape[0], hidden)
    loss, kl, cross_entropy, agreement = ChunkedLoss.apply(hidden, head, *weighing, 3, step, lambda rows: piece)
    return LinearTopKKL(loss, kl, None if labels is None else cross_entropy, agreement)


def chunk_loss(
    logits: Tensor,
    target: TopK,
    labels: Tensor | None,
    values: Tensor,
    factors: Tensor,
    weights: tuple[float, float],
    need_gradient: bool,
) -> Tensor:
    """Works through the logits [t, V] of a few tokens, in place. `values` [3, t] receives KL, cross-entropy and the
    loss a token; the logits give way to their gradient times `factors` [t, 1], if it is needed, and the answer is
    whether the argmaxes agree [t].

    With Z the normalizer of all logits and R that of the rest, q_k = exp(z_k - Z) and q_r = exp(R - Z):
    dKL/dz_k = q_k - p_k, and a token j of the rest gets its share exp(z_j - R) of q_r - p_r.
    """
    kl_weight, ce_weight = weights
    ids, log_p, log_p_tail = target.ids, target.log_probs, target.log_tail[:, None]
    first = logits.argmax(-1) == ids[:, 0]
    normalizer = torch.logsumexp(logits, -1, keepdim=True)
    if labels is not None:
        values[1] = (normalizer - logits.gather(1, labels))[:, 0]
    log_q = logits.gather(1, ids) - normalizer
    logits.scatter_(1, ids, -torch.inf)
    rest = torch.logsumexp(logits, -1, keepdim=True)
    log_q_tail = rest - normalizer
    p, p_tail = log_p.exp(), log_p_tail.exp()
    tail = torch.where(p_tail > 0, p_tail * (log_p_tail - log_q_tail), 0)
    values[0] = torch.where(p > 0, p * (log_p - log_q), 0).sum(-1) + tail[:, 0]
    values[2] = kl_weight * values[0] + ce_weight * values[1]
    if need_gradient:
        q, q_tail = log_q.exp(), log_q_tail.exp()
        # Of no rest at all (k = V) every logit is -inf by now, and stays a zero.
        logits.sub_(torch.where(rest > -torch.inf, rest, 0)).exp_()
        logits *= (kl_weight * (q_tail - p_tail) + ce_weight * q_tail) * factors
        logits.scatter_(1, ids, (kl_weight * (q - p) + ce_weight * q) * factors)
        if labels is not None and ce_weight:
            logits.scatter_add_(1, labels, -ce_weight * factors)
    return first
