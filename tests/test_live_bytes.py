"""What the counter of living tensors sees."""

from __future__ import annotations

import torch
from limbeck.benchmarks.live_bytes import LiveBytes
from torch._subclasses.fake_tensor import FakeTensorMode


def test_counts_each_storage_once_while_it_lives() -> None:
    weight = torch.zeros(256, requires_grad=True)
    with LiveBytes([weight, weight.detach()]) as live:
        assert live.now == live.peak == 1024
        doubled = weight * 2
        view = doubled.view(2, 128)
        assert live.now == 2048
        del doubled
        assert live.now == 2048  # the view holds it
        loss = (view * view).sum()  # which keeps the view, and nothing more
        assert live.now == 2048 + 4 and live.peak == 2048 + 1024 + 4
        live.restart()
        loss.backward()
        del view, loss
        assert live.now == 2048 and live.peak >= 3072  # the gradient, and what led to it


def test_sees_storages_that_change_their_size() -> None:
    with LiveBytes() as live:
        buffer = torch.zeros(256)
        buffer.untyped_storage().resize_(0)
        assert live.now == 0 and live.peak == 1024
        buffer.untyped_storage().resize_(2048)
        torch.zeros(1)
        assert live.peak == 2048 + 4


def test_counts_fake_tensors() -> None:
    with FakeTensorMode(), LiveBytes() as live:
        large = torch.empty(2**40, dtype=torch.bfloat16)
        small = large.sum(dtype=torch.float32)
        del large
        assert live.peak == 2**41 + 4 and live.now == 4 and small.shape == ()
