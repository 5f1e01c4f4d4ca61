"""Rows in parts: the gradient is that of a split, bit for bit, and without a copy where the parts' lie side by side."""

from __future__ import annotations

import pytest
import torch
from limbeck.kernels.parts import joined_rows, side_by_side, split_rows
from limbeck.models.hybrid import HybridLM
from limbeck.tests.helpers import random_model, tiny_config
from torch import Tensor

SIZES = (6, 2, 4)


def gradient(kinds: str, seed: int = 0) -> tuple[Tensor, Tensor, int]:
    """What split_rows gives for gradients that lie as `kinds` says, what torch's split gives for the same, and how
    many concatenations the former made."""
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(2, 5, size, generator=generator) for size in SIZES]
    if kinds == "together":
        laid = list(side_by_side(*(torch.empty(2, 5, size) for size in SIZES)))
        for place, value in zip(laid, values, strict=True):
            place.copy_(value)
    elif kinds == "in another order":
        laid = torch.cat(values[::-1], -1).split(SIZES[::-1], -1)[::-1]
    else:
        laid = values
    found, cats = [], 0
    for split in (split_rows, lambda rows, sizes: rows.split(sizes, -1)):
        rows = torch.zeros(2, 5, sum(SIZES), requires_grad=True)
        parts = split(rows, SIZES)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            torch.autograd.backward(parts, laid)
        if not found:
            cats = sum(event.count for event in profile.key_averages() if event.key == "aten::cat")
        assert rows.grad is not None
        found.append(rows.grad)
    return found[0], found[1], cats


@pytest.mark.parametrize(("kinds", "cats"), (("together", 0), ("apart", 1), ("in another order", 1)))
def test_the_gradient_of_parts(kinds: str, cats: int) -> None:
    ours, torchs, counted = gradient(kinds)
    assert torch.equal(ours, torchs) and counted == cats


def test_what_does_not_lie_side_by_side_is_not_joined() -> None:
    rows = torch.randn(3, 12)
    assert joined_rows(rows.split(SIZES, -1)).equal(rows)  # type: ignore[union-attr,no-untyped-call]
    assert joined_rows((rows[:, :6], rows[:, 6:8].clone())) is None
    assert joined_rows((rows[:, :6], rows[:, 7:9])) is None
    assert joined_rows((rows[:, :6], rows[:2, 6:8])) is None
    assert joined_rows((rows.flatten()[:6].expand(3, 6), rows.flatten()[6:8].expand(3, 2))) is None
    assert joined_rows((rows[:, ::2], rows[:, 1::2])) is None


def test_a_models_gradients_are_those_with_torchs_split(monkeypatch: pytest.MonkeyPatch) -> None:
    def gradients(model: HybridLM) -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        model(torch.arange(3, 23).view(2, 10)).float().logsumexp(-1).sum().backward()
        return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]

    model = random_model(tiny_config(), dtype=torch.float32)
    ours = gradients(model)
    monkeypatch.setattr("limbeck.models.mamba2.split_rows", lambda rows, sizes: rows.split(sizes, -1))
    assert all(torch.equal(one, other) for one, other in zip(ours, gradients(model), strict=True))
