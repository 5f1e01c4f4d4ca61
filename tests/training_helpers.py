"""Shared by the tests of training and of the gap: packed batches that are drawn, and a small model in float32."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from limbeck.distill.losses import DistillLoss, distillation_loss
from limbeck.distill.options import TrainOptions
from limbeck.distill.text.packing import Batch
from limbeck.models.hybrid import HybridLM
from limbeck.tests.helpers import random_model, tiny_config


def draw_batch(seed: int, count: int = 4, length: int = 20, vocabulary: int = 97) -> Batch:
    """Rows of several documents, with bytes of 1 to 4 a token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (count, length + 1), generator=generator)
    starts = torch.rand(count, length + 1, generator=generator) < 0.15
    documents = starts.cumsum(1) + 100 * seed + 10 * torch.arange(count)[:, None]
    labels = ids[:, 1:].masked_fill(documents[:, 1:] != documents[:, :-1], -100)
    n_bytes = torch.where(labels >= 0, labels % 4 + 1, 0).to(torch.int32)
    documents = documents[:, :-1]
    return Batch(ids[:, :-1], labels, (documents - documents[:, :1]).to(torch.int32), n_bytes, documents)


def draw_long_documents(seed: int, count: int = 4, length: int = 20, vocabulary: int = 97) -> Batch:
    """Rows of documents that continue from row to row and from batch to batch, the last tokens padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (count, length + 1), generator=generator)
    place = seed * count * length + torch.arange(count)[:, None] * length + torch.arange(length + 1)
    owner = place // 13
    labels = ids[:, 1:].masked_fill(owner[:, 1:] != owner[:, :-1], -100)
    labels[-1, -3:] = -100
    n_bytes = torch.where(labels >= 0, labels % 4 + 1, 0).to(torch.int32)
    return Batch(ids[:, :-1], labels, (owner - owner[:, :1])[:, :-1].to(torch.int32), n_bytes, owner[:, :-1])


def model_of(seed: int, **changes: Any) -> HybridLM:
    return random_model(tiny_config(**changes), seed, torch.float32)


def batches_from(start: int) -> Iterator[Batch]:
    while True:
        yield draw_batch(start)
        start += 1


def weights(model: HybridLM) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def teach() -> Any:
    """The loss of a model's teacher."""
    return distillation_loss(model_of(0), DistillLoss())


def options(**changes: Any) -> TrainOptions:
    return TrainOptions(**{"steps": 8, "learning_rate": 0.01, "warmup_steps": 2, "log_every": 1, **changes})


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
