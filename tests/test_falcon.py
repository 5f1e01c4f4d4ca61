"""Falcon-H1: attention beside Mamba-2 on one norm, and its multipliers, beside transformers' class."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from limbeck.models.config import HybridConfig
from limbeck.models.cost.inference import memory
from limbeck.models.cost.parameters import count_parameters
from limbeck.models.errors import InputError
from limbeck.models.multipliers import Multipliers
from limbeck.models.named import model_config
from limbeck.tests.family_draws import falcon_config
from limbeck.tests.family_helpers import check_parity, some_slow


@pytest.mark.parametrize("seed", some_slow(24, 9))
def test_transformers_computes_the_same(seed: int, tmp_path: Path) -> None:
    check_parity(falcon_config(seed), seed, tmp_path)


def public(**changes: Any) -> dict[str, Any]:
    """A config.json as published, small."""
    hf = {
        "model_type": "falcon_h1", "num_hidden_layers": 2, "vocab_size": 40, "hidden_size": 32,
        "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "mamba_d_ssm": 48,
        "mamba_n_heads": 6, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_d_conv": 4,
        "mamba_chunk_size": 128, "mamba_rms_norm": False, "mamba_norm_before_gate": False, "mamba_conv_bias": True,
        "mamba_proj_bias": False, "projectors_bias": False, "mlp_multipliers": [0.9, 0.5],
        "ssm_multipliers": [1, 2, 3, 4, 5],
        "rope_theta": 1e11, "mamba_expand": 2, "mamba_use_mlp": True, "attn_layer_indices": None,
    }  # fmt: skip
    return {name: value for name, value in (hf | changes).items() if value != "absent"}


def test_public_spellings_are_read() -> None:
    config = HybridConfig.from_hf(public())
    assert config.pattern == "P-P-" and config.d_inner == 48 and not config.mamba_rms_norm
    assert config.multipliers == Multipliers(mlp_gate=0.9, mlp_out=0.5, mamba_parts=(1, 2, 3, 4, 5))
    assert config.extra == {"mamba_expand": 2, "mamba_use_mlp": True, "attn_layer_indices": None}
    again = config.to_hf()
    assert HybridConfig.from_hf(again) == config and again["mamba_d_ssm"] == 48 and again["mamba_use_mlp"]
    auto = HybridConfig.from_hf(public(mamba_d_head="auto", layers_block_type=["hybrid"] * 2))
    assert auto == config
    assert HybridConfig.from_hf(public(mamba_d_ssm=None, mamba_n_heads=8)).d_inner == 64
    limited = HybridConfig.from_hf(public(time_step_limit=[0.0, {"__float__": "Infinity"}]))
    assert limited == config and HybridConfig.from_hf(public(time_step_limit=[0.1, 2])).dt_limit == (0.1, 2.0)


@pytest.mark.parametrize(
    ("change", "said"),
    (
        ({"mamba_d_ssm": 64}, "mamba_d_ssm is 64"),
        ({"mamba_d_ssm": None}, "mamba_d_ssm is 64"),
        ({"ssm_multipliers": [1, 2]}, "expected 5 numbers"),
        ({"mlp_multipliers": 2}, "mlp_multipliers is 2; expected a list"),
        ({"key_multiplier": "much"}, 'key_multiplier is "much"'),
        ({"lm_head_multiplier": 0}, "multiplier head is 0"),
        ({"embedding_multiplier": math.nan}, "embedding_multiplier is NaN; expected a finite number"),
        ({"projectors_bias": True}, "projectors_bias"),
        ({"mamba_proj_bias": True}, "mamba_proj_bias"),
        ({"layers_block_type": ["mamba"]}, "'mamba'"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"mamba_rms_norm": "yes"}, 'mamba_rms_norm is "yes"'),
        ({"mamba_n_heads": "absent"}, "mamba_n_heads is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2}}, "linear"),
    ),
)
def test_wrong_configs_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        HybridConfig.from_hf(public(**change))
    assert "\n" not in str(caught.value)


def test_what_cannot_be_said_is_not_written() -> None:
    config = falcon_config(0)
    for changes, said in (
        ({"pattern": "P-M-"}, "whole blocks"),
        ({"rope_theta": None}, "rope_theta"),
        ({"multipliers": Multipliers(residual=0.5)}, "residual is 0.5"),
        ({"multipliers": Multipliers(attention=0.1)}, "attention is 0.1"),
    ):
        with pytest.raises(InputError, match=said):
            config.replace(**changes).to_hf()
    with pytest.raises(InputError, match="multipliers"):
        falcon_config(0, family="qwen3", pattern="*-", qk_norm=True).to_hf()


@pytest.mark.parametrize(
    ("name", "parameters"),
    (
        ("falcon-h1-tiny-90m", 91_131_072), ("falcon-h1-0.5b", 521_411_104), ("falcon-h1-3b", 3_149_256_192),
        ("falcon-h1-7b", 7_585_513_568),
    ),
)  # fmt: skip
def test_published_sizes(name: str, parameters: int) -> None:
    config = model_config(name)
    assert count_parameters(config) == parameters
    assert HybridConfig.from_hf(config.to_hf()) == config
    # Keys and values, and states of scan and convolution, in every layer.
    report = memory(config, 1000, 2, chunk=None)
    blocks = config.num_layers // 2
    assert report.kv == 2 * blocks * 1000 * 2 * config.num_key_value_heads * config.head_dim * 2
    assert report.ssm == 2 * blocks * config.d_inner * config.ssm_state_size * 4
    assert report.vllm.block_size % 16 == 0 and report.vllm.block_size * 4 * config.num_key_value_heads * (
        config.head_dim
    ) >= (report.ssm + report.conv) // (2 * blocks)
