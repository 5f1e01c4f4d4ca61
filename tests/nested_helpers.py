"""Shared by the tests of nested sizes: targets within each other, and scores that are drawn."""

from __future__ import annotations

from typing import Any

from limbeck.models.config import HybridConfig
from limbeck.prune.scores import WidthScores
from limbeck.prune.width_metrics import RandomScores

MIDDLE = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "mamba_num_heads": 6,
          "mamba_head_dim": 6, "ssm_state_size": 12}  # fmt: skip
LEAST = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "mamba_num_heads": 4,
         "mamba_head_dim": 4, "ssm_state_size": 8}  # fmt: skip
TARGETS: list[dict[str, Any]] = [{}, MIDDLE, LEAST]
MIDDLE_EXPERTS = {"n_routed_experts": 5, "moe_intermediate_size": 10, "moe_shared_expert_intermediate_size": 16}
LEAST_EXPERTS = {"n_routed_experts": 4, "moe_intermediate_size": 8, "moe_shared_expert_intermediate_size": 8,
                 "num_experts_per_tok": 1}  # fmt: skip
EXPERT_TARGETS: list[dict[str, Any]] = [{}, MIDDLE | MIDDLE_EXPERTS, LEAST | LEAST_EXPERTS]


def scores_of(config: HybridConfig, seed: int = 3) -> WidthScores:
    return RandomScores(seed).scores(config)
