"""What both paths of the fused losses have to do alike."""

from __future__ import annotations

import torch
from limbeck.kernels.linear_kl import linear_cross_entropy, linear_kl


def check_ignored(divergence: str) -> None:
    """Ignored tokens add nothing whatever their logits are: values and gradients are the same bits."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for shape in ((6, 4), (31, 4), (6, 4), (31, 4))]
    labels = torch.tensor([3, -100, 7, -100, 0, 30])
    wild = [tensor.clone() for tensor in tensors]
    wild[0][1], wild[0][3, 0], wild[2][3] = 3e38, -3e38, 3e38  # logits of both infinities, and of none
    results = []
    for inputs in (tensors, wild):
        hidden, head = (tensor.clone().requires_grad_() for tensor in inputs[:2])
        found = linear_kl(
            hidden, head, *inputs[2:], divergence=divergence, labels=labels, ce_weight=0.3, normalizer=4, chunk_tokens=4
        )
        plain = linear_cross_entropy(hidden, head, labels)
        (found.loss + plain.loss).backward()
        results.append((found.loss, found.kl, found.cross_entropy, plain.loss, hidden.grad, head.grad))
    for expected, value in zip(*results, strict=True):
        assert torch.equal(expected, value)
