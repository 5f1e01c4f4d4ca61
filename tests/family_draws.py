"""Small configs that are held beside transformers' classes, everything that matters drawn."""

from __future__ import annotations

import random
from typing import Any

from limbeck.models.config import HybridConfig
from limbeck.models.multipliers import Multipliers
from limbeck.models.rope import Llama3Rope, RopeScaling, YarnRope
from limbeck.tests.helpers import dense_config, moe_config


def falcon_config(seed: int, **changes: Any) -> HybridConfig:
    """Everything that matters drawn; by turns without a norm after the scan, with one before the gate, and after it."""
    draw = random.Random(seed)

    def number() -> float:
        return round(draw.choice((0.5, 0.8, 1.0, 1.25)) * draw.choice((1, 1, -1)), 3)

    groups, kv = draw.choice((1, 1, 2)), draw.choice((1, 2))
    fields: dict[str, Any] = {
        "family": "falcon_h1", "pattern": "P-" * draw.randint(1, 3), "vocab_size": draw.randint(20, 90),
        "hidden_size": draw.choice((16, 24, 40)), "intermediate_size": draw.choice((12, 24, 40)),
        "num_attention_heads": kv * draw.choice((1, 2, 3)), "num_key_value_heads": kv,
        "head_dim": draw.choice((4, 8, 12)), "mamba_num_heads": groups * draw.choice((1, 2, 3)),
        "mamba_head_dim": draw.choice((4, 6, 16)), "n_groups": groups, "ssm_state_size": draw.choice((4, 8, 16)),
        "conv_kernel": draw.choice((2, 4)), "chunk_size": draw.choice((4, 8)), "norm_eps": draw.choice((1e-5, 1e-6)),
        "conv_bias": draw.random() < 0.8, "activation": "silu", "gated_mlp": True,
        "mamba_rms_norm": seed % 3 > 0, "norm_before_gate": seed % 3 < 2, "rope_theta": draw.choice((1e4, 1e11)),
        "attention_bias": draw.random() < 0.2, "mlp_bias": draw.random() < 0.2,
        "tie_word_embeddings": draw.random() < 0.5, "max_position_embeddings": 256, "pad_token_id": 0,
        "multipliers": Multipliers(
            embedding=abs(number()) * 5, head=abs(number()) / 20, key=number(), attention_in=number(),
            attention_out=number(), mamba_in=number(), mamba_out=number(), mlp_gate=number(), mlp_out=number(),
            mamba_parts=tuple(number() for _ in range(5)),
        ),
    }  # fmt: skip
    return HybridConfig(**(fields | changes))


def granite_config(seed: int, experts: bool = False, **changes: Any) -> HybridConfig:
    """Everything that matters drawn: expansions of 1 to 3, positions or none, blocks of either kind alone."""
    draw = random.Random(seed)
    kv, groups, size = draw.choice((1, 2)), draw.choice((1, 1, 2)), draw.choice((4, 8))
    heads = kv * draw.choice((1, 2, 3))
    hidden, own = heads * size, draw.choice((2, 4))
    blocks = [draw.choice(("M-", "M-", "*-")) for _ in range(draw.randint(1, 4))]
    rope = draw.random() < 0.4
    fields: dict[str, Any] = {
        "family": "granitemoehybrid", "pattern": "".join(blocks), "vocab_size": draw.randint(20, 90),
        "hidden_size": hidden, "intermediate_size": draw.choice((12, 24, 40)), "num_attention_heads": heads,
        "num_key_value_heads": kv, "head_dim": size, "norm_eps": draw.choice((1e-5, 1e-6)),
        "activation": "silu", "gated_mlp": True, "rope_theta": draw.choice((1e4, 1e7)) if rope else None,
        "rope_scaling": Llama3Rope(8.0, 1.0, 4.0, 16) if rope and draw.random() < 0.5 else None,
        "attention_bias": draw.random() < 0.2, "tie_word_embeddings": draw.random() < 0.5,
        "max_position_embeddings": 256, "pad_token_id": 0,
        "multipliers": Multipliers(
            embedding=draw.choice((1.0, 3.0, 12.0)), residual=draw.choice((0.22, 0.5, 1.0)),
            attention=draw.choice((0.0625, 0.3, 1.0)), logits_scaling=draw.choice((1.0, 6.0, 8.0)),
        ),
    }  # fmt: skip
    if experts:
        fields |= {
            "pattern": fields["pattern"].replace("-", "E"), "intermediate_size": 0, "router": "softmax",
            "n_routed_experts": draw.choice((3, 4, 8)), "num_experts_per_tok": draw.choice((1, 2, 3)),
            "moe_intermediate_size": draw.choice((8, 16)), "moe_shared_expert_intermediate_size": draw.choice((5, 12)),
        }  # fmt: skip
    if "*-" not in blocks:
        fields |= {"num_attention_heads": 0, "num_key_value_heads": 0, "head_dim": 0, "attention_bias": False}
    if "M-" in blocks:
        inner = hidden * draw.choice((1, 2, 3))
        fields |= {
            "mamba_num_heads": inner // own, "mamba_head_dim": own, "n_groups": groups if inner // own % 2 == 0 else 1,
            "ssm_state_size": draw.choice((4, 8, 16)), "conv_kernel": draw.choice((2, 4)),
            "chunk_size": draw.choice((4, 8)), "conv_bias": draw.random() < 0.8,
        }  # fmt: skip
    return HybridConfig(**(fields | changes))


def nemotron_config(seed: int, latent: bool = False) -> HybridConfig:
    """nemotron_h with experts, everything of their layer drawn; every third has groups."""
    draw = random.Random(seed)
    groups = draw.choice((2, 3)) if seed % 3 == 0 else 1
    experts = groups * draw.choice((2, 3, 5))
    best = draw.randint(1, groups)
    kv = draw.choice((1, 2))
    return moe_config(
        pattern=draw.choice(("E", "EE", "ME*E", "E-E", "*EM", "M-E*-E")),
        vocab_size=draw.choice((61, 90)),
        hidden_size=draw.choice((24, 32)),
        num_attention_heads=kv * draw.choice((1, 2)),
        num_key_value_heads=kv,
        n_routed_experts=experts,
        num_experts_per_tok=draw.randint(1, experts // groups * best),
        moe_intermediate_size=draw.choice((8, 20)),
        moe_shared_expert_intermediate_size=draw.choice((12, 36)),
        moe_latent_size=draw.choice((8, 40)) if latent else 0,
        n_group=groups,
        topk_group=best,
        norm_topk_prob=draw.random() < 0.7,
        routed_scaling_factor=draw.choice((1.0, 2.5)),
        tie_word_embeddings=draw.random() < 0.3,
        extra={"time_step_min": 1e-9},  # transformers clamps the step from below at it
        pad_token_id=0,
    )


def draw_scaling(seed: int) -> RopeScaling:
    """Every number that a config.json may state, drawn; most of the time some are left out."""
    draw = random.Random(seed)
    length = draw.choice((8, 16, 64, 1000))
    if seed % 2 == 0:
        return Llama3Rope(draw.choice((2.0, 8.0, 32.0)), draw.choice((0.5, 1.0)), draw.choice((2.0, 4.0)), length)
    scales: dict[str, Any] = draw.choice(({}, {"mscale": 0.7, "mscale_all_dim": 1.3}, {"attention_factor": 1.4}))
    if draw.random() < 0.5:
        scales |= {"beta_fast": draw.choice((32.0, 4.0)), "beta_slow": draw.choice((1.0, 2.0))}
    return YarnRope(draw.choice((1.0, 4.0, 40.0)), length, truncate=draw.choice((None, False, True)), **scales)


def stretched_config(seed: int) -> HybridConfig:
    """By turns llama and qwen3, with positions that are stretched, and biases."""
    config = dense_config(seed).replace(rope_theta=random.Random(seed).choice((100.0, 1e4, 5e5)))
    biases = {"attention_bias": seed % 3 == 0, "mlp_bias": seed % 4 == 0 and config.family == "llama"}
    return config.replace(rope_scaling=draw_scaling(seed // 2), **biases)
