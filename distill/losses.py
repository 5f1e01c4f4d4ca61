"""What training minimises: cross-entropy, or the divergence from a teacher. Sources: arXiv 1503.02531; arXiv 2407.14679
(forward KL on logits alone retrains a pruned model best, unless many layers go).

Each maker gives a `loss_of(model, rows, normalizer)` for `trainer.train`: the sum of the rows' token losses over the
normalizer, so that the gradient does not depend on how a batch is split. Rows carry input_ids, labels and seq_idx [B,
T], of whole rows or of a part of them (row_parts.py); tokens whose label is -100 count for nothing, in any part of the
loss, and others by their weights where there are some. A loss that changes with the steps has a method `at(step)`
beside, which the trainer calls before a step, counted from 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.divergence import Divergence
from ..kernels.linear_kl import linear_cross_entropy, linear_kl
from ..models.errors import InputError
from ..models.hybrid import HybridLM
from .hidden import Pairing, StreamObserver
from .options import DistillLoss as DistillLoss
from .options import greatest, weight_at
from .row_parts import states_of
from .teacher import SAMPLE, CachedTeacher, answer_loss

IGNORED = -100
LossOf = Callable[[HybridLM, Any, float], Tensor]


def cross_entropy_loss(model: HybridLM, rows: Any, normalizer: float) -> Tensor:
    """Next-token cross-entropy in nats, for pretraining."""
    hidden = states_of(model, rows).flatten(0, 1)
    labels = rows.labels.flatten()
    return linear_cross_entropy(
        hidden, model.head_weight, labels, token_weights=token_weights(rows), normalizer=normalizer
    ).loss


def token_weights(rows: Any) -> Tensor | None:
    """The weights of the labels of rows [B * T], where they have some."""
    weights = getattr(rows, "weights", None)
    return None if weights is None else weights.flatten()


class Distillation:
    """The student's distance from `teacher`, which is frozen: it gets neither gradients nor optimizer state. The
    teacher is a model, or what one has said about just these rows (`teacher.CachedTeacher`).

    Raises InputError where teacher and student do not share a vocabulary, where hidden states are to be compared and
    `pairing` is not given, and where a cached teacher does not hold what the loss needs.
    """

    def __init__(self, teacher: HybridLM | CachedTeacher, options: DistillLoss, pairing: Pairing | None = None) -> None:
        self.teacher, self.options, self.pairing = teacher, options, pairing
        if isinstance(teacher, CachedTeacher):
            check_cached(options, teacher)
        else:
            teacher.requires_grad_(False).eval()
        if pairing is None and greatest(options.hidden.weight) > 0:
            raise InputError("loss: hidden.weight is above 0, and no streams are paired; see hidden.make_pairing")
        self.at(0)

    def at(self, step: int) -> None:
        """Sets the weights of a step, counted from 0."""
        options = self.options
        self.kl_weight, self.ce_weight, self.hidden_weight = (
            weight_at(weight, step) for weight in (options.kl_weight, options.ce_weight, options.hidden.weight)
        )

    def __call__(self, student: HybridLM, rows: Any, normalizer: float) -> Tensor:
        check_vocabularies(self.teacher, student)
        if self.options.mtp_weight and not student.config.mtp_steps:
            raise InputError(
                f"loss: mtp_weight is {self.options.mtp_weight:g}, but the student has no multi-token prediction;"
                " expected 0"
            )
        if isinstance(self.teacher, CachedTeacher):
            return self.cached(self.teacher, student, rows, normalizer)
        active = self.pairing if self.hidden_weight > 0 else None
        ours = None if active is None else StreamObserver(stream for stream, _ in active.pairs)
        theirs = None if active is None else StreamObserver(stream for _, stream in active.pairs)
        with torch.no_grad():
            target = states_of(self.teacher, rows, theirs).flatten(0, 1)
        hidden = states_of(student, rows, ours).flatten(0, 1)
        loss = self.divergence(student, hidden, target, rows, normalizer)
        if self.options.mtp_weight:
            loss = loss + self.options.mtp_weight * self.ahead(student, rows, hidden, target, normalizer)
        if active is not None and ours is not None and theirs is not None:
            distance = active.distance(ours.take(), theirs.take())
            if (weights := token_weights(rows)) is not None:
                distance = distance * weights.view_as(distance)
            loss = loss + self.hidden_weight * distance[rows.labels >= 0].sum() / normalizer
        return loss

    @property
    def teacher_model(self) -> HybridLM:
        assert isinstance(self.teacher, HybridLM)
        return self.teacher

    def divergence(self, student: HybridLM, hidden: Tensor, target: Tensor, rows: Any, normalizer: float) -> Tensor:
        """The part of the loss that the logits have, of hidden states [B * T, H] of student and teacher."""
        return linear_kl(
            hidden,
            student.head_weight,
            target,
            self.teacher_model.head_weight,
            temperature=self.options.temperature,
            divergence=self.options.divergence,
            labels=rows.labels.flatten(),
            token_weights=token_weights(rows),
            kl_weight=self.kl_weight,
            ce_weight=self.ce_weight,
            normalizer=normalizer,
        ).loss

    def ahead(self, student: HybridLM, rows: Any, hidden: Tensor, target: Tensor, normalizer: float) -> Tensor:
        """The divergence of the student's multi-token prediction from what the teacher gives when it is there, the mean
        over steps. Its own layers alone are trained by it: not what they read, nor the head."""
        shape, loss = (*rows.input_ids.shape, -1), hidden.new_zeros((), dtype=torch.float32)
        hidden, target = hidden.detach().view(shape), target.view(shape)
        weights = getattr(rows, "weights", None)
        embedded = student.embed(rows.input_ids).detach()
        for step, states in enumerate(student.ahead_states(embedded, hidden, rows.seq_idx), 1):
            inside = rows.seq_idx[:, step:] == rows.seq_idx[:, :-step]  # the tokens that it read are of one document
            labels = torch.where(inside, rows.labels[:, step:], IGNORED).flatten()
            loss = (
                loss
                + linear_kl(
                    states.flatten(0, 1),
                    student.head_weight.detach(),
                    target[:, step:].flatten(0, 1),
                    self.teacher_model.head_weight,
                    temperature=self.options.temperature,
                    divergence=self.options.divergence,
                    labels=labels,
                    token_weights=None if weights is None else weights[:, step:].flatten(),
                    ignore_index=IGNORED,
                    normalizer=normalizer,
                ).loss
            )
        return loss / student.config.mtp_steps

    def cached(self, teacher: CachedTeacher, student: HybridLM, rows: Any, normalizer: float) -> Tensor:
        hidden = states_of(student, rows).flatten(0, 1)
        return answer_loss(
            hidden,
            student.head_weight,
            teacher.targets(rows),
            tail=self.options.tail,
            labels=rows.labels.flatten(),
            token_weights=token_weights(rows),
            kl_weight=self.kl_weight,
            ce_weight=self.ce_weight,
            normalizer=normalizer,
        ).loss


def distillation_loss(
    teacher: HybridLM | CachedTeacher, options: DistillLoss, pairing: Pairing | None = None
) -> Distillation:
    return Distillation(teacher, options, pairing)


def check_cached(options: DistillLoss, teacher: CachedTeacher) -> None:
    """Raises InputError for what a cache's answers, at temperature 1, do not tell."""
    if teacher.method == SAMPLE and not options.tail:
        raise InputError("loss: a cache of draws has no tail to leave out; set tail=true, or take a top-k cache")
    if (lacking := beyond_cache(options)) is not None:
        raise InputError(lacking)


def beyond_cache(options: DistillLoss) -> str | None:
    """What of a loss no cached teacher tells, and what to do; None where one tells all."""
    if options.divergence != Divergence.FORWARD.option or options.temperature != 1:
        return (
            f"loss: a cached teacher gives forward KL at temperature 1, not divergence={options.divergence} at"
            f" temperature={options.temperature}; change these, or take the teacher itself"
        )
    if options.mtp_weight:
        return (
            "loss: a cached teacher does not train multi-token prediction; set mtp_weight=0, or take the teacher itself"
        )
    if options.hidden_weighs:
        return "loss: a cached teacher has no hidden states; set hidden.weight=0, or take the teacher itself"
    return None


def check_vocabularies(teacher: HybridLM | CachedTeacher, student: HybridLM) -> None:
    known = teacher.vocab_size if isinstance(teacher, CachedTeacher) else teacher.config.vocab_size
    if known != student.config.vocab_size:
        raise InputError(
            f"teacher and student must share a vocabulary: the teacher has {known} tokens,"
            f" the student {student.config.vocab_size}"
        )
