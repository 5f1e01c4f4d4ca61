"""Shared by the tests of the search: a card that has no speed, a small space, candidates and rows of text."""

from __future__ import annotations

from typing import Any

import torch
from limbeck.distill.text.packing import Corpus
from limbeck.models.config import HybridConfig
from limbeck.models.cost.hardware import Hardware
from limbeck.prune.patterns import Rules
from limbeck.prune.scores import LayerScores
from limbeck.prune.search import Budget, Candidate, Space, find_candidates, find_depths

NOWHERE = Hardware("none", 1, 1, 0, 0)
TINY_SPACE = Space(
    layers=(4, 5, 6),
    hidden_size=(16, 24, 32),
    intermediate_size=(24, 48),
    num_attention_heads=(2, 4),
    mamba_num_heads=(4, 8),
    mamba_head_dim=(4, 8),
    align=1,
)


def candidates_of(config: HybridConfig, space: Space, order: tuple[int, ...] = ()) -> tuple[Candidate, ...]:
    depths = find_depths(config, space, Rules(), LayerScores(order))
    return find_candidates(config, space, depths, Budget(1e12, 64), NOWHERE).candidates


def batches_of(config: HybridConfig) -> list[Any]:
    ids = torch.randint(config.vocab_size, (200,), dtype=torch.int32).numpy()
    text = Corpus(ids, torch.tensor([0, 120, 200]).numpy(), ("a", "b"), torch.ones(config.vocab_size), 0)
    return list(text.sample(batch_size=2, seq_len=16))
