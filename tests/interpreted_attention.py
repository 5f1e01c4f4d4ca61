"""Decode attention's Triton kernels in Triton's interpreter, against float64; run as interpreted_loss.py is."""

from __future__ import annotations

import random

import limbeck.kernels.attention as attention_file
import pytest
import torch
from limbeck.kernels.attention import attention, decode_attention, decode_attention_op
from limbeck.tests.helpers import assert_close
from torch import Tensor


def reference(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """Head by head, each sequence up to its length."""
    y = torch.zeros(q.shape, dtype=torch.float64)
    for row, head in ((row, head) for row in range(q.shape[0]) for head in range(q.shape[1])):
        group, length = head // (q.shape[1] // k.shape[1]), int(lengths[row])
        if length:
            keys, values = k[row, group, :length].double(), v[row, group, :length].double()
            y[row, head] = torch.softmax(keys @ q[row, head].double() * q.shape[2] ** -0.5, 0) @ values
    return y


def check_decoding(seed: int, dtype: torch.dtype = torch.float32, ratio: float = 1e-5) -> None:
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, groups, grouped = draw.randint(1, 3), draw.choice((1, 2)), draw.choice((1, 3, 5))
    length, size = draw.choice((1, 31, 64, 150)), draw.choice((8, 12, 32, 80))
    q = torch.randn(groups * grouped, batch, size, generator=generator).transpose(0, 1).to(dtype)
    cache = torch.randn(2, batch, groups, length + 9, size, generator=generator).to(dtype)
    cache[:, :, :, length:] = float("nan")  # after the end lies what a longer sequence left
    if draw.random() < 0.5:  # tokens before heads in memory, as a projection leaves them
        cache = cache.transpose(2, 3).contiguous().transpose(2, 3)
    k, v = cache[:, :, :, :length]
    lengths = None if draw.random() < 0.4 else torch.randint(0, length + 1, (batch,), generator=generator)
    found = decode_attention(q, k, v, lengths)
    assert found.dtype == dtype
    expected = reference(q, k, v, torch.full((batch,), length) if lengths is None else lengths)
    assert_close("attention", expected, found, ratio)
    assert torch.equal(found, decode_attention(q, k, v, lengths))
    assert_close("torch path", expected, decode_attention(q.double(), k.double(), v.double(), lengths), 1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_decoding(seed: int) -> None:
    check_decoding(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6, 60))
def test_decoding_many(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_file, "BLOCK", {4: (16, 4)})
    check_decoding(seed)


def test_decoding_in_float16() -> None:
    check_decoding(1, torch.float16, 1e-3)


def test_one_token_takes_it_and_training_does_not() -> None:
    q, k = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 7, 8)
    expected = attention(q.double(), k.double(), k.double())
    assert_close("one token", expected, attention(q, k, k), 1e-5)
    attention(q.requires_grad_(), k, k).sum().backward()
    assert q.grad is not None


def test_op_keeps_torchs_rules() -> None:
    torch.library.opcheck(
        decode_attention_op, (torch.randn(2, 4, 8), *torch.randn(2, 2, 2, 7, 8).unbind(), torch.tensor([3, 7]))
    )
