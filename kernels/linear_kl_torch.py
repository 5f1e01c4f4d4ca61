"""linear_kl in torch operators: the CPU's path. Its chunks are fused_loss's, its divergences `divergence`'s.

Shapes: [t] tokens, [V] vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .divergence import FORMULAS, Divergence
from .fused_loss import ChunkedLoss, Piece, gradients_wanted
from .linear import linear
from .products import narrowed

Options = tuple[float, Divergence, float, float, int]  # temperature, divergence, kl_weight, ce_weight, chunk_tokens


def torch_linear_kl(
    hidden: Tensor,
    head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    labels: Tensor | None,
    weights: Tensor,
    scale: Tensor,
    options: Options,
) -> Any:
    """What `linear_kl.fused_loss` gives."""
    if teacher_hidden is not None and teacher_head is not None and gradients_wanted(hidden, head):
        teacher_hidden, teacher_head = narrowed(len(hidden), teacher_hidden, teacher_head)

    def open_chunk(rows: slice) -> Piece:
        teacher: Tensor | None = None
        if teacher_hidden is not None and teacher_head is not None:
            teacher = linear(teacher_hidden[rows], teacher_head).to(weights.dtype)

        def piece(logits: Tensor, inner: slice, outer: slice, values: Tensor, factors: Tensor, need: bool) -> Tensor:
            target = None if labels is None else labels[outer, None]
            return chunk_loss(
                logits, None if teacher is None else teacher[inner], target, values, factors, options, need
            )

        return piece

    return ChunkedLoss.apply(hidden, head, weights, scale, 4, options[-1], open_chunk)


def chunk_loss(
    logits: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    values: Tensor,
    factors: Tensor,
    options: Options,
    need_gradient: bool,
) -> Tensor:
    """Works through the logits [t, V] of a few tokens, in place. `values` [4, t] receives divergence, cross-entropies
    of student and teacher and the loss a token; the student's logits give way to the gradient times `factors` [t, 1],
    if it is needed. Returns whether the argmaxes agree [t]."""
    temperature, divergence, kl_weight, ce_weight, _ = options
    ranked_first = logits.argmax(-1)
    if teacher is None:
        assert labels is not None
        agree = ranked_first == labels[:, 0]
    else:
        agree = ranked_first == teacher.argmax(-1)
    # One log_softmax takes half the time of a logsumexp and a subtraction, and serves all that follows.
    student = torch.log_softmax(logits, -1)
    taught = None if teacher is None else torch.log_softmax(teacher, -1)
    if labels is not None:
        values[1] = -student.gather(1, labels)[:, 0]
        if taught is not None:
            values[2] = -taught.gather(1, labels)[:, 0]
    values[3] = ce_weight * values[1]
    gradient = None
    if need_gradient and ce_weight:
        assert labels is not None
        gradient = torch.exp(student, out=logits) if teacher is None else student.exp()
        gradient.scatter_add_(1, labels, -torch.ones_like(values[1])[:, None])
        gradient *= ce_weight * factors
    if taught is not None and teacher is not None:
        formula = FORMULAS[divergence]
        if formula.of_logits:
            student, taught = logits / temperature, teacher / temperature
        elif temperature != 1:
            student, taught = (torch.log_softmax(each / temperature, -1) for each in (logits, teacher))
        values[0] = formula.in_place(student, taught)
        values[3] += kl_weight * temperature**2 * values[0]
        if need_gradient:
            # T^2 keeps the gradient's size whatever T is (arXiv 1503.02531, section 2); one T goes with the chain rule
            # through logits / T.
            student *= kl_weight * temperature * factors
            gradient = student if gradient is None else gradient.add_(student)
    # The caller multiplies the same logits by the head: what it wants back lies in its own buffer.
    if gradient is not None and gradient is not logits:
        logits.copy_(gradient)
    return agree
