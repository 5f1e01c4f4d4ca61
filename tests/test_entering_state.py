"""Parts of a row scanned side by side, each with what enters it, against one scan of the row: values and gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from limbeck.kernels.entering_state import decay_from_start, entering_state, with_entering_state
from limbeck.kernels.ssd import ssd_scan
from limbeck.tests.helpers import assert_close
from torch import Tensor


def drawn(tokens: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    A = (-torch.rand(4, generator=generator, dtype=torch.float64) - 0.1).to(dtype).requires_grad_()
    return {"x": normal(2, tokens, 4, 3), "dt": normal(2, tokens, 4), "A": A, "B": normal(2, tokens, 2, 5),
            "C": normal(2, tokens, 2, 5), "dt_bias": normal(4), "D": normal(4)}  # fmt: skip


def in_parts(inputs: dict[str, Tensor], sizes: tuple[int, ...], document: Tensor | None, **options: Any) -> Tensor:
    """The answers of all parts, one after the other."""
    pieces = zip(*(inputs[name].split(sizes, 1) for name in ("x", "dt", "B", "C")), strict=True)
    A, steps = inputs["A"], {"dt_bias": inputs["dt_bias"], **options}
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    own: list[tuple[Tensor, ...]] = []
    for start, (x, dt, B, C) in zip(starts, pieces, strict=True):
        continues, seq_idx = torch.ones(2, x.shape[1], dtype=torch.bool), None
        if document is not None:
            seq_idx = document[:, start : start + x.shape[1]]
            continues = seq_idx == document[:, max(start - 1, 0), None]
        y, last = ssd_scan(x, dt, A, B, C, D=inputs["D"], seq_idx=seq_idx, return_final_state=True, **steps)
        own.append((y, C, last, decay_from_start(dt, A, continues, **steps)))
    states, decays = torch.stack([part[2] for part in own]), torch.stack([part[3][:, -1] for part in own])
    return torch.cat(
        [
            with_entering_state(y, C, entering_state(states, decays, number), decay)
            for number, (y, C, _, decay) in enumerate(own)
        ],
        1,
    )


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("limit", ((0.0, math.inf), (0.3, 1.5)))
def test_parts_against_the_whole(dtype: torch.dtype, packed: bool, limit: tuple[float, float]) -> None:
    """Of unequal sizes, a single token among them; documents that end at a border, before it and parts later."""
    sizes, document = (7, 1, 11, 6, 4), None
    inputs = drawn(sum(sizes), dtype)
    if packed:
        lengths = ((7, 12, 10), (3, 24, 2))
        document = torch.stack([torch.repeat_interleave(torch.arange(3), torch.tensor(each)) for each in lengths])
    options: dict[str, Any] = {"dt_softplus": True, "dt_limit": limit}
    expected = ssd_scan(**inputs, seq_idx=document, **options)
    found = in_parts(inputs, sizes, document, **options)
    ratio = 1e-11 if dtype == torch.float64 else 1e-5
    assert_close("y", expected, found, ratio)
    weight = torch.randn(expected.shape, dtype=dtype)
    gradients = [torch.autograd.grad((y * weight).sum(), list(inputs.values())) for y in (expected, found)]
    for name, ours, theirs in zip(inputs, *gradients, strict=True):
        assert_close(name, ours, theirs, ratio)


def test_blocks_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block's end changes nothing."""
    inputs = drawn(30, torch.float64)
    whole = in_parts(inputs, (13, 17), None)
    monkeypatch.setattr("limbeck.kernels.entering_state.BLOCK", 4)
    found = in_parts(inputs, (13, 17), None)
    assert_close("y", whole, found, 1e-14)
    weight = torch.randn(whole.shape, dtype=whole.dtype)
    gradients = [torch.autograd.grad((y * weight).sum(), list(inputs.values()), retain_graph=True) for y in (found,)]
    monkeypatch.undo()
    expected = torch.autograd.grad((whole * weight).sum(), list(inputs.values()))
    for name, ours, theirs in zip(inputs, expected, gradients[0], strict=True):
        assert_close(name, ours, theirs, 1e-13)
