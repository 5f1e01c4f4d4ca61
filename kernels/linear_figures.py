"""How far models are from a teacher, token by token, from hidden states and heads: one pass, never the [T, V] logits.

Beside what `linear_kl` gives while it trains these are the figures for judging: tokens go through in the same chunks,
the teacher's products serve all models, and a chunk's logits are worked through a few tokens at a time in plain torch.
Sources: the overlap sum_v min(p_v, q_v), one minus the total variation distance, is the share of a draft model's
tokens that speculative decoding would accept (arXiv 2211.17192).
Shapes: [T] tokens, [V] vocabulary, [H] a model's hidden width; p is the teacher's distribution, q the model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .fused_loss import CACHED, product
from .linear_kl import IGNORED, check_head, clean, default_chunk

TOP = 5
PIECE = {"cpu": CACHED, "cuda": 2**26}  # logits worked through at a time: a CPU's cache, 256 MiB of a GPU's memory


class LinearFigures(NamedTuple):
    """Per token [T] (0 where ignored): cross-entropy in nats; KL(teacher || model) and KL(model || teacher) in nats;
    the overlap of the distributions; the rank that the teacher's argmax has in the model, from 1 (equal logits do
    not push it back); the share of the teacher's top five among the model's; the model's argmax and its probability."""

    cross_entropy: Tensor
    kl: Tensor
    reverse_kl: Tensor
    overlap: Tensor
    rank: Tensor
    top5: Tensor
    choice: Tensor
    confidence: Tensor


class Teacher(NamedTuple):
    """Of a few tokens [t]: log-probabilities and probabilities [t, V], top-k tokens [t, 5]."""

    logs: Tensor
    p: Tensor
    top: Tensor


@torch.no_grad()
def linear_figures(
    models: Sequence[tuple[Tensor, Tensor]],
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = IGNORED,
    chunk_tokens: int | None = None,
) -> list[LinearFigures]:
    """The figures of the teacher itself, and then of each model (hidden [T, H], head [V, H]), for labels [T].

    Logits and what follows are float32, float64 where the hidden states are. Buffers are [chunk_tokens, V].
    Raises ValueError where shapes disagree.
    """
    pairs = [(teacher_hidden, teacher_head), *models]
    tokens, vocabulary = teacher_hidden.shape[0], teacher_head.shape[0]
    for number, (hidden, head) in enumerate(pairs):
        check_head(f"model {number}" if number else "teacher", hidden, head)
        if hidden.shape[0] != tokens or head.shape[0] != vocabulary:
            raise ValueError(
                f"linear_figures: model {number} has {hidden.shape[0]} tokens and a vocabulary of {head.shape[0]},"
                f" teacher {tokens} and {vocabulary}"
            )
    if tuple(labels.shape) != (tokens,):
        raise ValueError(f"linear_figures: labels have shape {tuple(labels.shape)}, expected ({tokens},)")
    target = clean(labels, ignore_index)
    assert target is not None
    step = chunk_tokens or default_chunk(vocabulary, teacher_hidden)
    piece = max(1, PIECE.get(teacher_hidden.device.type, CACHED) // vocabulary)
    parts: list[list[LinearFigures]] = [[] for _ in pairs]
    for start in range(0, max(tokens, 1), step):
        rows = slice(start, start + step)
        logits = [product(hidden[rows], head.T, full=hidden.dtype != torch.float64) for hidden, head in pairs]
        for begin in range(0, max(logits[0].shape[0], 1), piece):
            inner = slice(begin, begin + piece)
            results = piece_figures([values[inner] for values in logits], target[rows][inner])
            for part, figures in zip(parts, results, strict=True):
                part.append(figures)
        del logits  # before the next chunk's
    counted = labels != ignore_index
    return [LinearFigures(*(torch.cat(column) * counted for column in zip(*part, strict=True))) for part in parts]


def piece_figures(logits: Sequence[Tensor], labels: Tensor) -> list[LinearFigures]:
    """The figures from logits [t, V] of a few tokens, the teacher's first."""
    logs = torch.log_softmax(logits[0], -1)
    teacher = Teacher(logs, logs.exp(), logs.topk(min(TOP, logs.shape[1])).indices)
    return [against(teacher, values if number else None, labels) for number, values in enumerate(logits)]


def against(teacher: Teacher, logits: Tensor | None, labels: Tensor) -> LinearFigures:
    """A model's figures from its logits [t, V]; without any the teacher's own.

    The terms p log(p / q) + q - p have the divergence's sum, none is negative, and an error of log q falls out of each
    to first order: float32 is good for 1e-7, where the plain terms lose a digit to the rounding of the logarithms."""
    logs = teacher.logs if logits is None else torch.log_softmax(logits, -1)
    confidence, choice = logs.max(-1)
    cross_entropy = -logs.gather(1, labels[:, None])[:, 0]
    if logits is None:
        zero, one = torch.zeros_like(cross_entropy), torch.ones_like(cross_entropy)
        return LinearFigures(cross_entropy, zero, zero, one, torch.ones_like(choice), one, choice, confidence.exp())
    q, ratio = logs.exp(), teacher.logs - logs
    first = teacher.top[:, :1]
    rank = (logs > logs.gather(1, first)).sum(-1) + 1
    top = logs.topk(teacher.top.shape[1]).indices
    top5 = (top[:, :, None] == teacher.top[:, None, :]).any(-1).to(logs.dtype).mean(-1)
    excess = q - teacher.p
    kl = torch.addcmul(excess, teacher.p, ratio).sum(-1)
    reverse_kl = -torch.addcmul(excess, q, ratio).sum(-1)
    overlap = (1 - excess.abs().sum(-1) / 2).clamp_min(0)  # where both sum to 1: sum_v min(p_v, q_v)
    return LinearFigures(cross_entropy, kl, reverse_kl, overlap, rank, top5, choice, confidence.exp())
