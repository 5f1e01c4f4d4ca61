"""Head and loss in one against a teacher of whom tokens are known that were drawn from its distribution.

The share p^ that each token has of the draws is the teacher's p on average, and the gradient q - p^ that of forward KL:
unlike a top-k's it has no bias, whatever k is. The k draws of a place are one for each k-th part of the cumulative
distribution, all at the same offset within it (systematic sampling): a token comes within one draw of its k p, which
leaves less variance than k draws apart. The loss is -sum p^ log q - H(p), with the teacher's own entropy H. Source of
drawing instead of cutting: arXiv 2503.16870. Shapes: [T] tokens, [V] vocabulary, [H] hidden, [k] draws.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .linear_kl import IGNORED, check_head, clean, default_chunk, weigh
from .linear_topk_kl import LinearTopKKL, answered


class Draws(NamedTuple):
    """The tokens that were drawn [T, k], each as often as it was; the entropy in nats and the argmax [T]."""

    ids: Tensor
    entropy: Tensor
    first: Tensor


@torch.no_grad()
def linear_draws(hidden: Tensor, head: Tensor, k: int, offsets: Tensor, chunk_tokens: int | None = None) -> Draws:
    """Draws of a model with hidden states [T, H] and a head [V, H]; `offsets` [T], uniform in [0, 1), are all that is
    random. Buffers are [chunk_tokens, V].

    Raises ValueError where shapes disagree or k is less than 1.
    """
    check_head("teacher", hidden, head)
    if k < 1 or tuple(offsets.shape) != hidden.shape[:1]:
        raise ValueError(
            f"linear_draws: k is {k}, offsets have the shape {tuple(offsets.shape)}; expected at least 1, and"
            f" ({hidden.shape[0]},)"
        )
    work = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    parts, step = [], chunk_tokens or default_chunk(head.shape[0], hidden)
    for rows, own in zip(hidden.split(step), offsets.double().split(step), strict=True):
        log_p = (rows @ head.T).to(work).log_softmax(-1)
        # A float32 sum over a large vocabulary would give its last tokens more or less than is theirs.
        reached = log_p.double().exp().cumsum(-1)
        points = (torch.arange(k, device=own.device) + own[:, None]) / k * reached[:, -1:]
        ids = torch.searchsorted(reached, points, right=True).clamp_(max=head.shape[0] - 1)
        parts.append(Draws(ids, torch.special.entr(log_p.exp()).sum(-1), log_p.argmax(-1)))
    return Draws(*(torch.cat(part) for part in zip(*parts, strict=True)))


def linear_draws_kl(
    hidden: Tensor,
    head: Tensor,
    target: Draws,
    *,
    labels: Tensor | None = None,
    token_weights: Tensor | None = None,
    ignore_index: int = IGNORED,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    normalizer: Tensor | float | None = None,
    chunk_tokens: int | None = None,
) -> LinearTopKKL:
    """Distillation loss of hidden states [T, H] under a head [V, H] against the teacher's draws; of one place it may be
    negative, since it is KL on average.

    loss = sum_t (kl_weight KL_t + ce_weight cross_entropy_t) / normalizer over the tokens whose label [T] is not
    `ignore_index`, each times its `token_weights`; the normalizer is by default their sum. Gradients reach hidden
    states and head.

    Raises ValueError where shapes disagree.
    """
    check_head("student", hidden, head)
    tokens, k = hidden.shape[0], target.ids.shape[-1]
    if [tuple(part.shape) for part in target] != [(tokens, k), (tokens,), (tokens,)]:
        raise ValueError(
            f"linear_draws_kl: {tokens} tokens, but ids, entropy and first are"
            f" {', '.join(str(tuple(part.shape)) for part in target)}; expected [T, k], [T] and [T]"
        )
    if ce_weight and labels is None:
        raise ValueError("linear_draws_kl: ce_weight needs labels")
    weights, scale = weigh(tokens, labels, ignore_index, normalizer, hidden, token_weights)
    entropy, cleaned = target.entropy.to(weights.dtype), clean(labels, ignore_index)

    def piece(logits: Tensor, inner: slice, outer: slice, values: Tensor, factors: Tensor, need: bool) -> Tensor:
        ids = target.ids[outer]
        agree = logits.argmax(-1) == target.first[outer]
        log_q = logits.log_softmax(-1)
        if cleaned is not None:
            values[1] = -log_q.gather(1, cleaned[outer, None])[:, 0]
        values[0] = -log_q.gather(1, ids).mean(-1) - entropy[outer]
        values[2] = kl_weight * values[0] + ce_weight * values[1]
        if need:
            torch.exp(log_q, out=logits)
            logits *= (kl_weight + ce_weight) * factors
            logits.scatter_add_(1, ids, (-kl_weight / k * factors).expand(ids.shape))
            if cleaned is not None and ce_weight:
                logits.scatter_add_(1, cleaned[outer, None], -ce_weight * factors)
        return agree

    return answered(hidden, head, (weights, scale), piece, labels, chunk_tokens)
