"""linear_kl in torch operators: the CPU's path and the second witness. Its chunks are fused_loss's.

Shapes: [t] tokens, [V] vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .fused_loss import ChunkedLoss, Piece

Options = tuple[float, str, float, float, int]  # temperature, divergence, kl_weight, ce_weight, chunk_tokens


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

    def open_chunk(rows: slice) -> Piece:
        teacher: Tensor | None = None
        if teacher_hidden is not None and teacher_head is not None:
            teacher = (teacher_hidden[rows] @ teacher_head.T).to(weights.dtype)

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
    if it is needed, and the answer is whether the first ranks agree [t]."""
    temperature, divergence, kl_weight, ce_weight, _ = options
    ranked_first = logits.argmax(-1)
    if teacher is None:
        assert labels is not None
        agree = ranked_first == labels[:, 0]
    else:
        agree = ranked_first == teacher.argmax(-1)
    if labels is not None:
        normalizer = torch.logsumexp(logits, -1, keepdim=True)
        values[1] = (normalizer - logits.gather(1, labels))[:, 0]
        if teacher is not None:
            values[2] = torch.logsumexp(teacher, -1) - teacher.gather(1, labels)[:, 0]
    values[3] = ce_weight * values[1]
    dlogits = None
    if need_gradient and ce_weight:
        assert labels is not None
        # Without a teacher this is the last use of the raw logits, and takes their place.
        dlogits = (logits.sub_(normalizer) if teacher is None else logits - normalizer).exp_()
        dlogits.scatter_add_(1, labels, -torch.ones_like(values[1])[:, None])
        dlogits *= ce_weight * factors
    if teacher is not None:
        if temperature != 1:
            logits /= temperature
            teacher /= temperature
        logits -= torch.logsumexp(logits, -1, keepdim=True)
        teacher -= torch.logsumexp(teacher, -1, keepdim=True)
        values[0] = DIVERGENCE[divergence](logits, teacher)
        values[3] += kl_weight * temperature**2 * values[0]
        if need_gradient:
            logits *= kl_weight * temperature * factors  # T^2, and 1 / T from the logits' division
            if dlogits is not None:
                logits += dlogits
    return agree


# From log-probabilities [t, V]: the divergence [t]. Its gradient by the student's logits takes the place of the
# student's, and the teacher's are used up.
def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student)"""
    p_teacher = teacher.exp()
    kl = torch.linalg.vecdot(p_teacher, teacher.sub_(student))
    student.exp_().sub_(p_teacher)
    return kl


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student || teacher)"""
    p_student = student.exp()
    kl = torch.linalg.vecdot(p_student, student.sub_(teacher))
    student.sub_(kl[:, None]).mul_(p_student)
    return kl


def jensen_shannon(student: Tensor, teacher: Tensor) -> Tensor:
    """(KL(teacher || m) + KL(student || m)) / 2 with m = (p_teacher + p_student) / 2"""
    p_student, p_teacher = student.exp(), teacher.exp()
    log_middle = torch.logaddexp(student, teacher).sub_(0.6931471805599453)
    kl_student = torch.linalg.vecdot(p_student, student.sub_(log_middle))
    kl_teacher = torch.linalg.vecdot(p_teacher, teacher.sub_(log_middle))
    student.sub_(kl_student[:, None]).mul_(p_student).div_(2)
    return (kl_student + kl_teacher) / 2


DIVERGENCE = {"forward": forward_kl, "reverse": reverse_kl, "jsd": jensen_shannon}
