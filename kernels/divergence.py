"""Divergences between a student's and a teacher's distribution over the vocabulary, each with its code and formulas.

To add one: a member of `Divergence` and its row of FORMULAS here, and in linear_kl_triton its code at the top, and in
chunk_loss its branches in steps 2 and 3 (the last `else` of each is JSD's), SUMMED_FIRST where the gradient needs the
loss's own sum, and what is stored at the end. Options, the torch path, the launch, the reference and the tests read
these two.
Sources: arXiv 1503.02531 (forward KL at a temperature), 2306.08543 (reverse KL), 2306.13649 (Jensen-Shannon).
Shapes: [t] tokens, [V] vocabulary.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Divergence(enum.IntEnum):
    """The code is what the Triton kernel branches on, where 0 stands for no teacher; the option is the name in lower
    case. "forward" is KL(teacher || student), "reverse" the other way round, "jsd" the Jensen-Shannon divergence, and
    "mse" the mean over the vocabulary of the squared difference of the logits."""

    FORWARD = 1
    MSE = 2
    REVERSE = 3
    JSD = 4

    @property
    def option(self) -> str:
        return self.name.lower()


DIVERGENCES = {divergence.option: divergence for divergence in Divergence}


class Formula(NamedTuple):
    """`in_place` takes student and teacher [t, V] and returns the divergence [t]: its gradient by the student's logits
    over T overwrites the student's values, and the teacher's are used up. `reference` is the definition. Both get
    log-probabilities at the temperature T, or the logits over T where `of_logits`."""

    in_place: Callable[[Tensor, Tensor], Tensor]
    reference: Callable[[Tensor, Tensor], Tensor]
    of_logits: bool = False


# In place, since a piece of logits is as large as a CPU's cache: every further buffer of its size goes to main memory.
def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    p_teacher = teacher.exp()
    kl = torch.linalg.vecdot(p_teacher, teacher.sub_(student))
    student.exp_().sub_(p_teacher)
    return kl


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    p_student = student.exp()
    kl = torch.linalg.vecdot(p_student, student.sub_(teacher))
    student.sub_(kl[:, None]).mul_(p_student)
    return kl


def jensen_shannon(student: Tensor, teacher: Tensor) -> Tensor:
    p_student, p_teacher = student.exp(), teacher.exp()
    log_middle = torch.logaddexp(student, teacher).sub_(math.log(2))
    kl_student = torch.linalg.vecdot(p_student, student.sub_(log_middle))
    kl_teacher = torch.linalg.vecdot(p_teacher, teacher.sub_(log_middle))
    # The middle m depends on the student too, but that part of the gradient is -sum dm, which is zero.
    student.sub_(kl_student[:, None]).mul_(p_student).div_(2)
    return (kl_student + kl_teacher) / 2


def mean_squared(student: Tensor, teacher: Tensor) -> Tensor:
    difference, size = student.sub_(teacher), student.shape[-1]
    mean = torch.linalg.vecdot(difference, difference) / size
    difference *= 2 / size
    return mean


def kl_reference(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities."""
    return (p.exp() * (p - q)).sum(-1)


def jsd_reference(student: Tensor, teacher: Tensor) -> Tensor:
    middle = torch.log((teacher.exp() + student.exp()) / 2)
    return (kl_reference(teacher, middle) + kl_reference(student, middle)) / 2


FORMULAS = {
    Divergence.FORWARD: Formula(forward_kl, lambda student, teacher: kl_reference(teacher, student)),
    Divergence.MSE: Formula(mean_squared, lambda student, teacher: (student - teacher).square().mean(-1), True),
    Divergence.REVERSE: Formula(reverse_kl, kl_reference),
    Divergence.JSD: Formula(jensen_shannon, jsd_reference),
}
