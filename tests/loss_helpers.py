"""What both paths of the fused losses have to do alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from limbeck.kernels.linear_draws_kl import linear_draws, linear_draws_kl
from limbeck.kernels.linear_kl import linear_cross_entropy, linear_kl
from limbeck.kernels.linear_reverse_kl import linear_reverse_kl
from limbeck.kernels.linear_topk_kl import linear_topk, linear_topk_kl
from torch import Tensor

LABELS = torch.tensor([3, -100, 7, -100, 0, 30])

# Losses of student's hidden states and head and the teacher's, against a part of the vocabulary.
PARTIAL: dict[str, Callable[..., Any]] = {
    "top-k": lambda *own: linear_topk_kl(*own[:2], linear_topk(*own[2:], 5), labels=LABELS, ce_weight=0.3),
    "draws": lambda *own: linear_draws_kl(
        *own[:2], linear_draws(*own[2:], 5, torch.arange(6) / 6), labels=LABELS, ce_weight=0.3
    ),
    "reverse, top-k": lambda *own: linear_reverse_kl(*own, labels=LABELS, top_k=5),
    "reverse, drawn": lambda *own: linear_reverse_kl(*own, labels=LABELS, clip=3.0),
}


def check_ignored(divergence: str) -> None:
    """`linear_kl` and `linear_cross_entropy`."""

    def losses(hidden: Tensor, head: Tensor, *teacher: Tensor) -> tuple[Tensor, ...]:
        found = linear_kl(
            hidden, head, *teacher, divergence=divergence, labels=LABELS, ce_weight=0.3, normalizer=4, chunk_tokens=4
        )
        plain = linear_cross_entropy(hidden, head, LABELS)
        return found.loss + plain.loss, found.kl, found.cross_entropy, plain.loss  # type: ignore[return-value]

    check_wild(losses)


def check_wild(losses: Callable[..., tuple[Tensor | None, ...]]) -> None:
    """Ignored tokens add nothing whatever their logits are: values and gradients are the same bits. Of what `losses`
    gives the first has gradients."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for shape in ((6, 4), (31, 4), (6, 4), (31, 4))]
    wild = [tensor.clone() for tensor in tensors]
    wild[0][1], wild[0][3, 0], wild[2][3] = 3e38, -3e38, 3e38  # logits of both infinities, and of none
    assert not (wild[0] @ wild[1].T)[1].isfinite().all() and not (wild[2] @ wild[3].T)[3].isfinite().all()
    results = []
    for inputs in (tensors, wild):
        hidden, head = (tensor.clone().requires_grad_() for tensor in inputs[:2])
        values = losses(hidden, head, *inputs[2:])
        assert values[0] is not None
        values[0].backward()
        results.append((*(value for value in values if value is not None), hidden.grad, head.grad))
    for expected, value in zip(*results, strict=True):
        assert expected is not None and expected.isfinite().all() and torch.equal(expected, value)
