"""The fused losses on the torch path: values and gradients against float64, and no logits of all tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from limbeck.kernels.divergence import DIVERGENCES
from limbeck.kernels.linear_kl import linear_cross_entropy, linear_kl
from limbeck.kernels.reference import linear_kl_reference
from limbeck.tests.helpers import Largest, assert_close
from limbeck.tests.loss_helpers import PARTIAL, check_ignored, check_wild

VALUES, GRADIENTS = 1e-5, 1e-4


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", (1.0, 2.5))
@pytest.mark.parametrize("mix", (0.0, 0.4))
def test_linear_kl(divergence: str, temperature: float, mix: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((11, 5), (23, 5), (11, 7), (23, 7))
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    labels = torch.randint(23, (11,), generator=generator)
    labels[2] = labels[9] = -100
    options: dict[str, Any] = {
        "divergence": divergence,
        "temperature": temperature,
        "labels": labels,
        "kl_weight": 1 - mix,
        "ce_weight": mix,
        "normalizer": 6.5,
    }
    exact = [tensor.double().requires_grad_() for tensor in tensors]
    expected, expected_kl = linear_kl_reference(*exact, **options)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    found = linear_kl(*leaves, **options, chunk_tokens=4)
    assert_close("loss", expected, found.loss, VALUES)
    assert_close("kl", expected_kl, found.kl, VALUES)
    (3 * expected).backward()
    (3 * found.loss).backward()
    for number, name in enumerate(("hidden", "head")):
        assert exact[number].grad is not None and leaves[number].grad is not None
        assert_close(name, exact[number].grad, leaves[number].grad, GRADIENTS)  # type: ignore[arg-type]
    assert leaves[2].grad is None and leaves[3].grad is None, "the teacher must not get a gradient"
    agree = (tensors[0] @ tensors[1].T).argmax(-1) == (tensors[2] @ tensors[3].T).argmax(-1)
    assert torch.equal(found.agreement, agree & (labels >= 0))


def test_linear_kl_never_holds_all_logits_and_does_not_depend_on_the_split() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(64, 4, generator=generator), torch.randn(500, 4, generator=generator)
    target, target_head = torch.randn(64, 6, generator=generator), torch.randn(500, 6, generator=generator)
    with Largest() as largest:
        leaf = hidden.clone().requires_grad_()
        whole = linear_kl(leaf, head, target, target_head, normalizer=64, chunk_tokens=8)
        whole.loss.backward()
    assert largest.numel <= 8 * 500
    other = hidden.clone().requires_grad_()
    parts = [
        linear_kl(other[a:b], head, target[a:b], target_head, normalizer=64).loss
        for a, b in ((0, 5), (5, 40), (40, 64))
    ]
    torch.stack(parts).sum().backward()
    assert_close("loss", whole.loss, sum(parts), 1e-6)  # type: ignore[arg-type]
    assert leaf.grad is not None and other.grad is not None
    assert_close("gradient", leaf.grad, other.grad, 1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_ignored_tokens_add_nothing_whatever_their_logits(divergence: str) -> None:
    check_ignored(divergence)


@pytest.mark.parametrize("name", PARTIAL)
def test_ignored_tokens_add_nothing_to_losses_against_a_part_of_the_vocabulary(name: str) -> None:
    check_wild(PARTIAL[name])


def test_linear_cross_entropy_is_torchs() -> None:
    hidden, head = torch.randn(9, 4, requires_grad=True), torch.randn(30, 4, requires_grad=True)
    labels = torch.randint(30, (9,))
    labels[4] = -100
    found = linear_cross_entropy(hidden, head, labels, chunk_tokens=2)
    expected = torch.nn.functional.cross_entropy(hidden @ head.T, labels)
    assert_close("loss", expected, found.loss, 1e-6)
    for a, b in zip(torch.autograd.grad(expected, (hidden, head)), torch.autograd.grad(found.loss, (hidden, head)),
                    strict=True):  # fmt: skip
        assert_close("gradient", a, b, 1e-5)
