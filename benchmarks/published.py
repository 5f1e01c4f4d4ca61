"""The published models that benchmarks draw at random; conf/model/ says the same to those who can read YAML."""

from __future__ import annotations

from typing import Any

from limbeck.models.config import HybridConfig

NEMOTRON: dict[str, Any] = {  # NVIDIA-NeMo/Megatron-Bridge's model providers
    "vocab_size": 131072,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "mamba_num_heads": 128,
    "mamba_head_dim": 80,
    "n_groups": 8,
    "ssm_state_size": 128,
    "pad_token_id": 12,
}
PUBLISHED = {
    "nemotron-nano-9b-v2": HybridConfig(
        pattern="M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
        hidden_size=4480,
        intermediate_size=15680,
        **NEMOTRON,
    ),
    "nemotron-nano-12b-v2": HybridConfig(
        pattern="M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-",
        hidden_size=5120,
        intermediate_size=20480,
        **NEMOTRON,
    ),
    "qwen3-8b": HybridConfig(  # arXiv 2505.09388
        pattern="*-" * 36,
        family="qwen3",
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        norm_eps=1e-6,
        activation="silu",
        gated_mlp=True,
        qk_norm=True,
        rope_theta=1e6,
        max_position_embeddings=40960,
        bos_token_id=151643,
        eos_token_id=151645,
    ),
}
