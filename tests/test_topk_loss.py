"""The loss against a teacher's top-k tokens: float64 formulas, gradients, and the way to the dense loss."""

from __future__ import annotations

import itertools

import pytest
import torch
from limbeck.kernels.linear_kl import linear_kl
from limbeck.kernels.linear_topk_kl import TopK, linear_topk, linear_topk_kl
from limbeck.tests.helpers import assert_close
from torch import Tensor
from torch.nn import functional as F

T, V, H = 23, 61, 12


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Student's hidden states and head, the teacher's, and labels of which some are ignored."""
    student, head = torch.randn(T, H, dtype=dtype), torch.randn(V, H, dtype=dtype) / 2
    teacher, teacher_head = torch.randn(T, H + 3, dtype=dtype), torch.randn(V, H + 3, dtype=dtype) / 2
    labels = torch.randint(0, V, (T,)).masked_fill(torch.rand(T) < 0.3, -100)
    return student.requires_grad_(), head.requires_grad_(), teacher, teacher_head, labels


def buckets(logits: Tensor, ids: Tensor, tail: bool) -> Tensor:
    """Probabilities of the k tokens and of the rest, [T, k + 1]."""
    p = logits.softmax(-1)
    kept = p.gather(1, ids)
    return torch.cat((kept, 1 - kept.sum(1, keepdim=True)), 1) if tail else kept


def dense_loss(
    student: Tensor, head: Tensor, teacher_logits: Tensor, labels: Tensor, k: int, tail: bool, kl: float, ce: float
) -> Tensor:
    """The formula with all logits at once."""
    logits = student @ head.T
    ids = teacher_logits.topk(k, -1).indices
    p, q = buckets(teacher_logits, ids, tail), buckets(logits, ids, tail)
    p = p / p.sum(-1, keepdim=True)
    divergence = (p * (p.log() - q.log())).sum(-1)
    entropy = F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
    return ((kl * divergence + ce * entropy) * (labels >= 0)).sum() / 7.0


@pytest.mark.parametrize("tail", (True, False))
@pytest.mark.parametrize("k", (1, 5, V - 1))
@pytest.mark.parametrize("weights", ((1.0, 0.0), (0.7, 0.3), (0.0, 1.0)))
@pytest.mark.parametrize("chunk", (1, 7, None))
def test_values_and_gradients(tail: bool, k: int, weights: tuple[float, float], chunk: int | None) -> None:
    student, head, teacher, teacher_head, labels = problem()
    kl, ce = weights
    expected = dense_loss(student, head, teacher @ teacher_head.T, labels, k, tail, kl, ce)
    gradients = torch.autograd.grad(expected, (student, head))
    target = linear_topk(teacher, teacher_head, k, chunk)
    found = linear_topk_kl(
        student, head, target, tail=tail, labels=labels, kl_weight=kl, ce_weight=ce, normalizer=7.0, chunk_tokens=chunk
    )
    assert_close("loss", expected, found.loss, 1e-12)
    for name, a, b in zip(("hidden", "head"), gradients, torch.autograd.grad(found.loss, (student, head)), strict=True):
        assert_close(name, a, b, 1e-11)
    assert (found.kl[labels < 0] == 0).all() and not found.agreement[labels < 0].any()
    ranks = (student @ head.T).argmax(-1) == (teacher @ teacher_head.T).argmax(-1)
    assert torch.equal(found.agreement, ranks & (labels >= 0))


@pytest.mark.parametrize("tail", (True, False))
def test_all_tokens_are_the_dense_loss(tail: bool) -> None:
    """And on the way there the bucket's loss only grows: merging outcomes never adds to a KL."""
    student, head, teacher, teacher_head, labels = problem()
    dense = linear_kl(student, head, teacher, teacher_head, labels=labels, ce_weight=0.5)
    found = linear_topk_kl(
        student, head, linear_topk(teacher, teacher_head, V), tail=tail, labels=labels, ce_weight=0.5
    )
    assert_close("loss", dense.loss, found.loss, 1e-12)
    both = [torch.autograd.grad(loss, (student, head)) for loss in (dense.loss, found.loss)]
    for a, b in zip(*both, strict=True):
        assert_close("gradient", a, b, 1e-11)
    if tail:
        losses = [linear_topk_kl(student, head, linear_topk(teacher, teacher_head, k)).kl for k in (1, 2, 8, 30, V)]
        assert all((a <= b + 1e-12).all() for a, b in itertools.pairwise(losses))


def test_rounded_and_extreme_targets_stay_finite() -> None:
    """float16 log-probabilities; a teacher or a student that is certain; a student whose tail has underflown."""
    student, head, teacher, teacher_head, labels = problem(torch.float32)
    exact = linear_topk(teacher, teacher_head, 8)
    rounded = TopK(exact.ids, exact.log_probs.half(), exact.log_tail.half())
    losses = [linear_topk_kl(student, head, target, labels=labels).loss for target in (exact, rounded)]
    assert abs(losses[0] - losses[1]) < 1e-3 * losses[0]
    for left, right in ((400.0, 1.0), (1.0, 400.0), (400.0, 400.0)):
        certain = linear_topk(teacher * left, teacher_head, 8)
        found = linear_topk_kl(student * right, head, certain, labels=labels)
        gradient = torch.autograd.grad(found.loss, student)[0]
        assert torch.isfinite(found.loss) and torch.isfinite(gradient).all() and (found.kl > -1e-4).all()


def test_equal_models_have_no_loss() -> None:
    student, head, _, _, labels = problem()
    found = linear_topk_kl(student, head, linear_topk(student, head, 4), labels=labels)
    assert abs(found.loss) < 1e-13 and torch.autograd.grad(found.loss, student)[0].abs().max() < 1e-13
    assert torch.equal(found.agreement, labels >= 0)


def test_wrong_shapes() -> None:
    student, head, teacher, teacher_head, _ = problem()
    with pytest.raises(ValueError, match="k is 62"):
        linear_topk(teacher, teacher_head, V + 1)
    with pytest.raises(ValueError, match="expected"):
        linear_topk_kl(student, head, linear_topk(teacher[:5], teacher_head, 3))
    with pytest.raises(ValueError, match="needs labels"):
        linear_topk_kl(student, head, linear_topk(teacher, teacher_head, 3), ce_weight=1.0)
