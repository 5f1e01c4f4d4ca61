"""What training minimises: cross-entropy, or the divergence from a teacher's logits. Sources: arXiv 1503.02531;
arXiv 2407.14679 (forward KL on logits alone retrains a pruned model best).

Each maker gives a `loss_of(model, rows, normalizer)` for `trainer.train`: the sum of the rows' token losses over
the normalizer. Rows carry input_ids, labels and seq_idx [B, T]; tokens whose label is -100 count for nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.linear_kl import DIVERGENCE, linear_cross_entropy, linear_kl
from ..models.errors import InputError
from ..models.hybrid import HybridLM

LossOf = Callable[[HybridLM, Any, float], Tensor]


@dataclasses.dataclass(frozen=True)
class DistillLoss:
    """kl_weight T^2 divergence + ce_weight cross-entropy, per token, at the temperature T."""

    divergence: str = "forward"
    temperature: float = 1.0
    kl_weight: float = 1.0
    ce_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCE:
            raise InputError(f"loss: divergence {self.divergence!r} is unknown; known: {', '.join(DIVERGENCE)}")
        if not self.temperature > 0:
            raise InputError(f"loss: temperature is {self.temperature}; expected more than 0")
        if self.kl_weight < 0 or self.ce_weight < 0 or self.kl_weight + self.ce_weight == 0:
            raise InputError(
                f"loss: kl_weight ({self.kl_weight}) and ce_weight ({self.ce_weight}) must not be negative nor both 0"
            )


def cross_entropy_loss(model: HybridLM, rows: Any, normalizer: float) -> Tensor:
    """Next-token cross-entropy in nats, for pretraining."""
    hidden = model.hidden_states(rows.input_ids, seq_idx=rows.seq_idx).flatten(0, 1)
    return linear_cross_entropy(hidden, model.head_weight, rows.labels.flatten(), normalizer=normalizer).loss


def distillation_loss(teacher: HybridLM, options: DistillLoss) -> LossOf:
    """The student's distance from `teacher`, which is frozen: it gets neither gradients nor optimizer state.

    Raises InputError where teacher and student do not share a vocabulary.
    """
    teacher.requires_grad_(False).eval()

    def loss_of(student: HybridLM, rows: Any, normalizer: float) -> Tensor:
        check_vocabularies(teacher, student)
        with torch.no_grad():
            target = teacher.hidden_states(rows.input_ids, seq_idx=rows.seq_idx).flatten(0, 1)
        hidden = student.hidden_states(rows.input_ids, seq_idx=rows.seq_idx).flatten(0, 1)
        return linear_kl(
            hidden,
            student.head_weight,
            target,
            teacher.head_weight,
            temperature=options.temperature,
            divergence=options.divergence,
            labels=rows.labels.flatten(),
            kl_weight=options.kl_weight,
            ce_weight=options.ce_weight,
            normalizer=normalizer,
        ).loss

    return loss_of


def check_vocabularies(teacher: HybridLM, student: HybridLM) -> None:
    if teacher.config.vocab_size != student.config.vocab_size:
        raise InputError(
            f"teacher and student must share a vocabulary: the teacher has {teacher.config.vocab_size} tokens,"
            f" the student {student.config.vocab_size}"
        )
