"""Head and loss in one for text that the student drew itself: reverse KL, KL(student || teacher), from a part of the
vocabulary, or from the drawn tokens alone.

Over the student's top-k tokens and all others as one outcome, the divergence is at most the dense one (log-sum
inequality), and is it at k = V. From the drawn token y alone, log q(y) - log p(y) is an unbiased estimate of it, and
the same number times the gradient of log q(y) one of its gradient: a policy gradient (arXiv 2306.08543) whose advantage
is log p(y) - log q(y). The dense divergence is `linear_kl`'s. Tokens go through in chunks, as there; all in torch.
Shapes: [T] tokens, [t] tokens of a piece, [V] vocabulary, [Hs] and [Ht] hidden widths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .fused_loss import ChunkedLoss, Piece, gradients_wanted
from .linear import linear
from .linear_kl import IGNORED, LinearKL, check_head, clean, default_chunk, weigh
from .products import narrowed


def linear_reverse_kl(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    labels: Tensor,
    top_k: int | None = None,
    clip: float | None = None,
    token_weights: Tensor | None = None,
    ignore_index: int = IGNORED,
    kl_weight: float = 1.0,
    normalizer: Tensor | float | None = None,
    chunk_tokens: int | None = None,
) -> LinearKL:
    """Reverse KL of student_hidden [T, Hs] under student_head [V, Hs] from the teacher's [T, Ht] and [V, Ht]: over the
    student's `top_k` tokens and the rest, or estimated from the drawn tokens, the labels [T], whose log-ratio is cut to
    -`clip` .. `clip`.

    loss = sum_t kl_weight kl_t / normalizer over the tokens whose label is not `ignore_index`, each times its
    `token_weights` [T]; the normalizer is by default their sum. `kl` is what the loss adds up. Gradients reach the
    student's hidden states and head.

    Raises ValueError where shapes disagree, where not just one of `top_k` and `clip` is given, or where it is out of
    range.
    """
    check_head("student", student_hidden, student_head)
    check_head("teacher", teacher_hidden, teacher_head)
    (tokens, _), vocabulary = student_hidden.shape, student_head.shape[0]
    if teacher_hidden.shape[0] != tokens or teacher_head.shape[0] != vocabulary:
        raise ValueError(
            f"linear_reverse_kl: student has {tokens} tokens and a vocabulary of {vocabulary},"
            f" teacher {teacher_hidden.shape[0]} and {teacher_head.shape[0]}"
        )
    if (top_k is None) == (clip is None):
        raise ValueError(f"linear_reverse_kl: top_k is {top_k}, clip {clip}; expected one of the two")
    if top_k is not None and not 1 <= top_k <= vocabulary:
        raise ValueError(f"linear_reverse_kl: top_k is {top_k}, expected 1 to the vocabulary's {vocabulary}")
    if clip is not None and not clip > 0:
        raise ValueError(f"linear_reverse_kl: clip is {clip}, expected more than 0")
    weights, scale = weigh(tokens, labels, ignore_index, normalizer, student_hidden, token_weights)
    drawn = clean(labels, ignore_index)
    assert drawn is not None
    if gradients_wanted(student_hidden, student_head):
        teacher_hidden, teacher_head = narrowed(tokens, teacher_hidden, teacher_head)

    def open_chunk(rows: slice) -> Piece:
        taught = linear(teacher_hidden[rows], teacher_head).to(weights.dtype)

        def piece(logits: Tensor, inner: slice, outer: slice, values: Tensor, factors: Tensor, need: bool) -> Tensor:
            agree = logits.argmax(-1) == taught[inner].argmax(-1)
            log_q, log_p = logits.log_softmax(-1), taught[inner].log_softmax(-1)
            token = drawn[outer, None]
            values[1], values[2] = -log_q.gather(1, token)[:, 0], -log_p.gather(1, token)[:, 0]
            if top_k is not None:
                values[0] = top_k_piece(logits, log_q, log_p, top_k)
            else:
                assert clip is not None
                values[0] = drawn_piece(logits, log_q, log_p, token, clip)
            values[3] = kl_weight * values[0]
            if need:
                logits *= kl_weight * factors
            return agree

        return piece

    chunk = chunk_tokens or default_chunk(vocabulary, student_hidden)
    return LinearKL(*ChunkedLoss.apply(student_hidden, student_head, weights, scale, 4, chunk, open_chunk))


def top_k_piece(gradient: Tensor, log_q: Tensor, log_p: Tensor, k: int) -> Tensor:
    """The divergence [t] over the student's k tokens and the rest r; `gradient` [t, V] by the logits is written.

    dKL/dz_j = q_j (log q_b - log p_b - KL) for a token j of the outcome b, which is j itself or r.
    """
    named, ids = log_q.topk(k, -1)
    ratio = named - log_p.gather(1, ids)
    q = named.exp()
    torch.exp(log_q, out=gradient)
    rest_q, rest_p = (
        torch.logsumexp(each.scatter(1, ids, -torch.inf), -1, keepdim=True) for each in (log_q, log_p)
    )  # of no rest at all (k = V) both are -inf
    rest_ratio = torch.where(rest_q > -torch.inf, rest_q - rest_p, 0)
    kl = (q * ratio).sum(-1, keepdim=True) + rest_q.exp() * rest_ratio
    gradient *= rest_ratio - kl
    gradient.scatter_(1, ids, q * (ratio - kl))
    return kl[:, 0]


def drawn_piece(gradient: Tensor, log_q: Tensor, log_p: Tensor, token: Tensor, clip: float) -> Tensor:
    """log q(y) - log p(y) [t] of the drawn tokens [t, 1], cut to -clip .. clip; `gradient` [t, V] by the logits, this
    number times that of log q(y), is written."""
    ratio = (log_q.gather(1, token) - log_p.gather(1, token)).clamp(-clip, clip)
    torch.exp(log_q, out=gradient)
    gradient *= -ratio
    gradient.scatter_add_(1, token, ratio)
    return ratio[:, 0]
