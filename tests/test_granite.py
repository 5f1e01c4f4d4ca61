"""Granite 4 hybrids: multipliers, and sizes that follow from others, beside transformers' class."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from limbeck.models.checkpoint import load_model, save_model
from limbeck.models.config import HybridConfig
from limbeck.models.cost.parameters import count_active, count_parameters
from limbeck.models.errors import InputError
from limbeck.models.multipliers import Multipliers
from limbeck.models.named import model_config
from limbeck.prune.choose import select
from limbeck.prune.search import Space
from limbeck.prune.slice import written_config
from limbeck.prune.target import Target, with_widths
from limbeck.prune.width_metrics import RandomScores
from limbeck.tests.family_draws import granite_config
from limbeck.tests.family_helpers import check_parity, some_slow
from limbeck.tests.helpers import assert_close, random_model
from limbeck.tests.search_helpers import candidates_of


@pytest.mark.parametrize("experts", (False, True), ids=("dense", "experts"))
@pytest.mark.parametrize("seed", some_slow(24, 6))
def test_transformers_computes_the_same(seed: int, experts: bool, tmp_path: Path) -> None:
    check_parity(granite_config(seed, experts), seed, tmp_path)


def public(**changes: Any) -> dict[str, Any]:
    """A config.json as published, small."""
    hf = {
        "model_type": "granitemoehybrid", "num_hidden_layers": 3, "layer_types": ["mamba", "attention", "mamba"],
        "vocab_size": 40, "hidden_size": 32, "intermediate_size": 16, "shared_intermediate_size": 24,
        "num_local_experts": 0, "num_experts_per_tok": 0, "num_attention_heads": 4, "num_key_value_heads": 2,
        "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_expand": 2,
        "position_embedding_type": "nope", "embedding_multiplier": 12, "attention_multiplier": 0.015625,
        "residual_multiplier": 0.22, "logits_scaling": 6, "tie_word_embeddings": True, "rope_theta": 10000,
    }  # fmt: skip
    return {name: value for name, value in (hf | changes).items() if value != "absent"}


def test_public_spellings_are_read() -> None:
    config = HybridConfig.from_hf(public())
    assert (config.pattern, config.head_dim, config.intermediate_size, config.rope_theta) == ("M-*-M-", 8, 24, None)
    assert config.multipliers == Multipliers(12, 0.22, logits_scaling=6, attention=1 / 64)
    assert config.extra == {"intermediate_size": 16, "num_experts_per_tok": 0, "rope_theta": 10000}
    again = config.to_hf()
    assert HybridConfig.from_hf(again) == config
    assert {name: again[name] for name in public()} == public()
    newer = ["linear_attention", "full_attention", "linear_attention"]
    assert HybridConfig.from_hf(public(layer_types=newer)) == config
    assert HybridConfig.from_hf(public(layer_types="absent", layers_block_type=newer)) == config
    assert HybridConfig.from_hf(public(mamba_d_head="auto", time_step_limit=[0, {"__float__": "Infinity"}])) == config
    assert HybridConfig.from_hf(public(layer_types=None)).pattern == "M-M-M-"
    turned = HybridConfig.from_hf(public(position_embedding_type="rope"))
    assert turned.rope_theta == 10000 and turned.to_hf()["position_embedding_type"] == "rope"
    dense = HybridConfig.from_hf(public(layer_types=["attention"] * 3))
    assert dense.mamba_num_heads == 0 and HybridConfig.from_hf(dense.to_hf()) == dense


@pytest.mark.parametrize("said", (None, "absent"))
def test_an_attention_multiplier_that_is_not_said(said: str | None, tmp_path: Path) -> None:
    """Of null transformers' attention makes 1 / sqrt(head_dim), of nothing 1."""
    transformers = pytest.importorskip("transformers")
    config = HybridConfig.from_hf(public(attention_multiplier=said))
    assert config.multipliers.attention == (1.0 if said else None)
    save_model(random_model(config, 1, torch.float32), tmp_path / "model")
    content = json.loads((tmp_path / "model" / "config.json").read_text())
    assert content["attention_multiplier"] == (1.0 if said else 8**-0.5)
    content |= {"attention_multiplier": None}
    if said:
        del content["attention_multiplier"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(content))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    ids, ours = torch.arange(1, 30)[None], load_model(tmp_path / "model")
    save_model(ours, tmp_path / "again")
    with torch.no_grad():
        for model in (ours, load_model(tmp_path / "again")):
            assert_close("logits", theirs(ids, use_cache=False).logits, model(ids), 1e-5)
    alone = HybridConfig.from_hf(public(attention_multiplier=said, layer_types=["mamba"] * 3))
    assert HybridConfig.from_hf(alone.to_hf()) == alone


@pytest.mark.parametrize(
    ("change", "said"),
    (
        ({"mamba_expand": 3}, "mamba_expand"),
        ({"mamba_n_heads": 7}, r"mamba_n_heads \(7\)"),
        ({"layer_types": ["mamba", "attention"]}, "layer_types has 2 layers"),
        ({"layer_types": ["mamba", "attention", "mlp"]}, "'mlp'"),
        ({"layers_block_type": ["mamba"] * 3}, "disagree"),
        ({"mamba_proj_bias": True}, "mamba_proj_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"residual_multiplier": "little"}, 'residual_multiplier is "little"'),
        ({"logits_scaling": 0}, "logits_scaling is 0"),
        ({"shared_intermediate_size": "absent"}, "shared_intermediate_size is missing"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_local_experts": 4, "num_experts_per_tok": 5}, "more than the experts"),
        ({"num_local_experts": 4}, "num_experts_per_tok"),
        ({"num_local_experts": -1}, "num_local_experts"),
        ({"num_local_experts": 4, "num_experts_per_tok": 2, "scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'"),
    ),
)
def test_wrong_configs_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        HybridConfig.from_hf(public(**change))
    assert "\n" not in str(caught.value)


H_1B = HybridConfig.from_hf(
    public(num_hidden_layers=40, layer_types=["attention" if n % 10 == 5 else "mamba" for n in range(40)],
           vocab_size=100352, hidden_size=1536, shared_intermediate_size=4096, num_attention_heads=12,
           num_key_value_heads=4, mamba_n_heads=48, mamba_d_head=64, mamba_d_state=128)
)  # fmt: skip


EXPERTS = {"pattern": "ME", "router": "softmax", "n_routed_experts": 4, "num_experts_per_tok": 2,
           "moe_intermediate_size": 8, "moe_shared_expert_intermediate_size": 8}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    (
        ({"hidden_size": 1280}, "hidden_size=1024 num_attention_heads=8 or hidden_size=1536 num_attention_heads=12"),
        ({"num_attention_heads": 8}, "hidden_size=1024 num_attention_heads=8"),
        ({"hidden_size": 1024, "num_attention_heads": 8, "mamba_num_heads": 40}, "mamba_num_heads=16 or 32 or 48"),
        ({"hidden_size": 1024, "num_attention_heads": 8, "mamba_head_dim": 40}, "mamba_expand"),
        ({"multipliers": Multipliers(key=2.0)}, "key is 2.0"),
        ({"pattern": "MM"}, "whole blocks"),
        (EXPERTS | {"pattern": "MEM-"}, "some blocks alone"),
        (EXPERTS | {"router": "sigmoid"}, "router 'sigmoid'"),
        (EXPERTS | {"moe_shared_expert_intermediate_size": 0}, "shared expert 0 wide"),
    ),
)
def test_what_its_readers_would_refuse_is_not_written(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        H_1B.replace(**changes).to_hf()
    assert "\n" not in str(caught.value)


CUTS = (
    {"num_key_value_heads": 2},
    {"num_key_value_heads": 1, "mamba_num_heads": 40},
    {"mamba_num_heads": 40},
    {"mamba_head_dim": 40, "hidden_size": 1024},
    {"hidden_size": 1280},
    {"hidden_size": 1280, "mamba_num_heads": 44},
    {"num_attention_heads": 8},
    {"hidden_size": 512, "num_attention_heads": 8},
)


@pytest.mark.parametrize("target", CUTS, ids=str)
def test_sizes_that_are_offered_are_accepted(target: dict[str, int]) -> None:
    """Whoever gives one of the offers in place of what was wrong has a cut that can be written."""
    config = H_1B.replace(pattern="M-*-", vocab_size=16)
    scores = RandomScores(0).scores(config)

    def cut(widths: dict[str, int]) -> HybridConfig:
        return written_config(config, select(config, scores, (), Target(**widths)))

    with pytest.raises(InputError, match="give ") as caught:
        cut(target)
    words = str(caught.value).split("give ")[1]
    offers = [dict(re.findall(r"(\w+)=(\d+)", offer)) for offer in words.split(" or ")]
    name = re.match(r"\w+", words)
    assert name is not None
    offers = [offer or {name[0]: number} for offer, number in zip(offers, words.split(" or "), strict=True)]
    for offer in offers:
        after = cut(target | {width: int(size) for width, size in offer.items()})
        assert after.hidden_size <= 1536 and after.head_dim == 128, offer


def test_heads_go_with_a_hidden_size_that_is_given() -> None:
    config = H_1B.replace(pattern="M-*-", vocab_size=16)
    for given, heads in (({}, 32), ({"num_attention_heads": 8}, 32), ({"mamba_num_heads": 16}, 16)):
        widths = with_widths(config, config.pattern, Target(hidden_size=1024, **given)).widths
        assert widths == {"hidden_size": 1024, "num_attention_heads": 8, "mamba_num_heads": heads}
    assert with_widths(config, "M-", Target(hidden_size=1024)).widths == {"hidden_size": 1024, "mamba_num_heads": 32}
    space = Space(hidden_size=(1024, 1536), intermediate_size=(2048, 4096))
    found = candidates_of(config, space)
    assert [candidate.config.mamba_num_heads for candidate in found] == [32, 32, 48, 48]
    assert "target.mamba_num_heads=32" in found[0].words() and len(found[-1].words()) == 0
    held = candidates_of(config, Space(hidden_size=(1024,), mamba_num_heads=(16, 48)))
    for candidate, heads in zip(held, (16, 48), strict=True):
        selection = candidate.selection(config, RandomScores(0).scores(config))
        assert written_config(config, selection) == candidate.config and candidate.config.mamba_num_heads == heads


def test_published_sizes() -> None:
    tiny, small, dense = (model_config(f"granite-4.0-h-{name}") for name in ("tiny", "small", "1b"))
    assert (count_parameters(tiny), count_active(tiny)) == (6_939_037_248, 1_465_470_528)
    assert count_parameters(small) == 32_207_337_984
    assert count_parameters(dense) == count_parameters(H_1B) == 1_461_538_368
    assert tiny.pattern == "ME" * 5 + ("*E" + "ME" * 9) * 3 + "*E" + "ME" * 4
    hf = tiny.to_hf()
    assert (hf["intermediate_size"], hf["shared_intermediate_size"], hf["num_local_experts"]) == (512, 1024, 64)
    assert HybridConfig.from_hf(hf) == tiny
    smaller = H_1B.replace(hidden_size=1024, num_attention_heads=8)
    assert [smaller.replace(mamba_num_heads=heads).to_hf()["mamba_expand"] for heads in (16, 32, 48)] == [1, 2, 3]


@pytest.mark.parametrize("share", (0.95, 0.7, 0.4, 0.2))
def test_widths_for_a_number_of_parameters_go_together(share: float) -> None:
    """The heads of both kinds go with hidden_size, and the MLP makes up for the steps between."""
    target = with_widths(H_1B, H_1B.pattern, Target(parameters=share))
    after = H_1B.replace(**target.widths)
    assert after.to_hf()["mamba_expand"] == 2 and after.head_dim * after.num_attention_heads == after.hidden_size
    assert 0.93 * share <= count_parameters(after) / count_parameters(H_1B) <= share
    experts = model_config("granite-4.0-h-tiny")
    after = experts.replace(**with_widths(experts, experts.pattern, Target(parameters=share)).widths)
    assert after.to_hf()["mamba_expand"] == 2
    assert (0.999 if share > 0.2 else 0.95) * share <= count_parameters(after) / count_parameters(experts) <= share
    assert after.hidden_size == 1536 or share < 0.3
    held = with_widths(H_1B, H_1B.pattern, Target(parameters=max(share, 0.7), hidden_size=1536))
    assert held.widths.keys() <= {"hidden_size", "intermediate_size"}
