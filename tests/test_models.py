"""Configs, the table of axes, and the cost model, against the published figures; the model against its own cache."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from limbeck.models.axes import axis_sizes, tensor_table
from limbeck.models.config import HybridConfig
from limbeck.models.cost.hardware import GIB, Hardware
from limbeck.models.cost.inference import memory, verdict
from limbeck.models.cost.parameters import count_parameters, num_tensors
from limbeck.models.errors import InputError
from limbeck.models.generate.cache import Cache
from limbeck.models.generate.generate import generate
from limbeck.models.hybrid import HybridLM
from limbeck.scripts.run.resolve import model_config, model_names
from limbeck.tests.helpers import any_config, assert_close, random_model, tiny_config

PUBLISHED = {"nemotron-nano-12b-v2": (12_310_001_152, 369), "nemotron-nano-9b-v2": (8_888_227_328, 341),
             "qwen3-8b": (8_190_735_360, 399), "smollm2-135m": (134_515_008, 272),
             "nemotron-3-nano-30b-a3b": (31_577_937_344, 6243), "nemotron-3-nano-4b": (3_973_556_832, 263),
             "nemotron-3-super-120b-a12b": (120_668_687_360, 41_643)}  # fmt: skip


def closed_formula(c: HybridConfig) -> int:
    """The parameter count as the papers' architectures give it, layer kind by layer kind."""
    di, h = c.d_inner, c.hidden_size
    conv = di + 2 * c.n_groups * c.ssm_state_size
    mamba = h * (di + conv + c.mamba_num_heads) + c.conv_kernel * conv + conv + 3 * c.mamba_num_heads + di + di * h + h
    nq, nkv = c.num_attention_heads, c.num_key_value_heads
    attention = h * (nq + 2 * nkv) * c.head_dim + nq * c.head_dim * h + h + 2 * c.head_dim * c.qk_norm
    mlp = (2 + c.gated_mlp) * h * c.intermediate_size + h
    width, shared = c.moe_latent_size or h, 2 * h * (c.moe_shared_expert_intermediate_size + c.moe_latent_size)
    experts = h + c.n_routed_experts * (h + 2 * c.moe_intermediate_size * width) + shared
    kinds = {"M": mamba, "*": attention, "-": mlp, "E": experts}
    return sum(kinds[letter] for letter in c.pattern) + h + (2 - c.tie_word_embeddings) * c.vocab_size * h


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts_come_from_the_table(name: str) -> None:
    config = model_config(name)
    assert (count_parameters(config), num_tensors(config)) == PUBLISHED[name]


PLAIN = ("nemotron_h", "llama", "qwen3")  # families without multipliers or layers of several mixers


@pytest.mark.parametrize("name", [name for name in sorted(model_names()) if model_config(name).family in PLAIN])
def test_closed_formula_agrees(name: str) -> None:
    assert closed_formula(model_config(name)) == count_parameters(model_config(name))


@pytest.mark.parametrize("seed", (*range(30), *range(50, 62)))
def test_table_names_and_shapes_are_the_models(seed: int) -> None:
    config = any_config(seed)
    weights = {name: tuple(weight.shape) for name, weight in HybridLM(config, device="meta").named_parameters()}
    assert weights == {name: tensor.shape for name, tensor in tensor_table(config).items()}
    assert all(size > 0 for size in axis_sizes(config).values())


@pytest.mark.parametrize("seed", (*range(30), *range(50, 62)))
def test_config_survives_the_round_trip(seed: int) -> None:
    config = any_config(seed)
    assert HybridConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def spelled(**changes: Any) -> dict[str, Any]:
    hf = tiny_config().to_hf()
    return {key: value for key, value in (hf | changes).items() if value is not None}


@pytest.mark.parametrize(
    "other",
    (
        {"hybrid_override_pattern": None, "layers_block_type": ["mamba", "mlp", "mamba", "attention", "mlp", "mamba"]},
        {
            "hybrid_override_pattern": None,
            "layer_types": ["linear_attention", "mlp", "linear_attention", "full_attention", "mlp", "linear_attention"],
        },
        {"n_groups": None, "mamba_num_groups": 2},
        {"n_groups": None, "mamba_n_groups": 2},
        {"ssm_state_size": None, "mamba_state_dim": 16},
        {"layer_norm_epsilon": None, "rms_norm_eps": 1e-5},
        {"head_dim": None, "attention_head_dim": 8},
        {"time_step_limit": [0.0, {"__float__": "Infinity"}]},
        {"time_step_limit": [0.0, math.inf]},
        {"num_hidden_layers": None},
    ),
)
def test_every_spelling_is_read_alike(other: dict[str, Any]) -> None:
    assert HybridConfig.from_hf(spelled(**other)) == tiny_config()


@pytest.mark.parametrize(
    ("change", "said"),
    (
        ({"hybrid_override_pattern": None}, "no layer pattern"),
        ({"hybrid_override_pattern": "M-X*-M"}, "'X'"),
        ({"hybrid_override_pattern": "ME", "num_hidden_layers": 2}, "n_routed_experts|needs a width"),
        ({"hybrid_override_pattern": "M-", "layers_block_type": ["mlp", "mlp"], "num_hidden_layers": 2}, "disagree"),
        ({"num_hidden_layers": 7}, "7"),
        ({"mamba_num_heads": 7}, "7"),
        ({"mamba_num_heads": "many"}, "many"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"hidden_size": None}, "hidden_size"),
        ({"use_bias": True}, "use_bias"),
        ({"mlp_hidden_act": "gelu"}, "gelu"),
        ({"model_type": "bert"}, "bert"),
        ({"n_groups": 2, "mamba_n_groups": 4}, "different things"),
        ({"layer_norm_epsilon": None, "rms_norm_eps": 1e-3}, "transformers takes 1e-05; give layer_norm_epsilon"),
    ),
)
def test_wrong_configs_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        HybridConfig.from_hf(spelled(**change))
    assert "\n" not in str(caught.value)


def test_memory_floors_of_the_published_models() -> None:
    """arXiv 2508.14444's budget, and the floors at 131072 tokens x 1 with fp32 SSM states."""
    large, small = model_config("nemotron-nano-12b-v2"), model_config("nemotron-nano-9b-v2")
    shallow = large.replace(pattern=small.pattern)
    found = [round(memory(config, 131072).total / GIB, 2) for config in (large, shallow, small)]
    assert found == [26.07, 23.34, 18.69]
    assert memory(small, 131072).kv // 131072 == 16 * 1024 and memory(large, 131072).kv // 131072 == 24 * 1024
    assert round((memory(small, 1).ssm + memory(small, 1).conv) / GIB, 3) == 0.134
    card = Hardware("a10g", 24, 22.06, 600, 70)
    budget = card.budget(0.05, 1.3, 0)
    assert round(budget / GIB, 2) == 19.66
    fits = verdict(small, memory(small, 131072), budget)
    assert fits.fits and not verdict(large, memory(large, 131072), budget).fits
    assert memory(small, fits.largest_context).peak <= budget < memory(small, fits.largest_context + 1).peak
    assert fits.largest_batch == 1 and not verdict(small, memory(small, 131072, 2), budget).fits


def test_memory_of_a_dense_model() -> None:
    """Qwen3-8B: 15.256 GiB in bf16, 144 KiB of keys and values a token."""
    report = memory(model_config("qwen3-8b"), 40960)
    assert round(report.weights / GIB, 3) == 15.256
    assert report.kv == 40960 * 144 * 1024 and report.ssm == report.conv == 0
    assert report.vllm.block_size == 16 and report.vllm.bytes_per_request == report.kv


def test_vllm_block_and_bytes() -> None:
    """By hand for the 9B: a Mamba page of 128 x 80 x 128 x 4 + 12288 x 3 x 2 bytes in blocks of 4096 bytes a token."""
    report = memory(model_config("nemotron-nano-9b-v2"), 131072).vllm
    page = 128 * 80 * 128 * 4 + (10240 + 2048) * 3 * 2
    assert report.block_size == 16 * math.ceil(page / (16 * 4096)) == 1312
    assert report.bytes_per_request == 4 * 1312 * 4096 * (math.ceil(131072 / 1312) + math.ceil(27 / 4))


@pytest.mark.parametrize("wrong", ((0, 1), (1, 0), (-5, 1)))
def test_memory_refuses_nothing(wrong: tuple[int, int]) -> None:
    with pytest.raises(InputError):
        memory(tiny_config(), *wrong)


@pytest.mark.parametrize("pattern", ("M-M*-M", "*-", "MM"))
def test_cached_generation_is_the_full_forward(pattern: str) -> None:
    """Greedy text, token for token, for prompts of every length from 1 to two chunks and beyond."""
    config = tiny_config(pattern=pattern)
    model = random_model(config, dtype=torch.float32)
    ids = torch.randint(config.vocab_size, (2, 2 * config.chunk_size + 1))
    for length in range(1, ids.shape[1] + 1):
        prompt = ids[:, :length]
        found = generate(model, prompt, 5, prefill_chunk=1 + length % 7)
        expected = prompt
        with torch.no_grad():
            for _ in range(5):
                expected = torch.cat((expected, model(expected)[:, -1:].argmax(-1)), 1)
        assert torch.equal(found, expected), length


def test_cache_in_any_split_gives_the_same_logits() -> None:
    config = tiny_config(conv_kernel=3)
    model = random_model(config)
    ids = torch.randint(config.vocab_size, (3, 21))
    with torch.no_grad():
        whole = model(ids)
        for cuts in ((1, 2, 3, 4, 21), (8, 16, 21), (7, 8, 9, 20, 21), (20, 21)):
            cache = Cache(config, 3, 21, dtype=torch.float64, ssm_dtype=torch.float64)
            starts = (0, *cuts[:-1])
            parts = [model(ids[:, a:b], cache=cache) for a, b in zip(starts, cuts, strict=True)]
            assert_close("logits", whole, torch.cat(parts, 1), 1e-12)


def test_packed_documents_do_not_see_each_other() -> None:
    config = tiny_config()
    model = random_model(config)
    ids = torch.randint(config.vocab_size, (1, 24))
    seq_idx = torch.tensor([[4] * 5 + [9] * 1 + [2] * 18])
    with torch.no_grad():
        packed = model(ids, seq_idx=seq_idx)
        alone = torch.cat([model(part) for part in ids.split((5, 1, 18), 1)], 1)
    assert_close("logits", alone, packed, 1e-12)


def test_sampling() -> None:
    model = random_model(tiny_config(), dtype=torch.float32)
    ids = torch.randint(97, (2, 5))
    drawn = [generate(model, ids, 12, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    greedy = generate(model, ids, 12)
    for options in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        assert torch.equal(generate(model, ids, 12, temperature=2.0, **options), greedy)
    end = int(greedy[0, 7])
    stopped = generate(model, ids[:1], 12, eos_token_id=end)
    assert stopped[0, -1] == end and stopped.shape[1] <= 8 and torch.equal(stopped, greedy[:1, : stopped.shape[1]])


@pytest.mark.parametrize(
    "wrong",
    (
        {"input_ids": torch.zeros(1, 0, dtype=torch.int64)},
        {"input_ids": torch.tensor([[97]])},
        {"temperature": -1.0},
        {"top_k": 0},
        {"top_p": 0.0},
        {"max_new_tokens": 0},
        {"max_new_tokens": 10**6},
    ),
)
def test_generate_refuses(wrong: dict[str, Any]) -> None:
    options: dict[str, Any] = {"input_ids": torch.tensor([[1, 2]]), "max_new_tokens": 3} | wrong
    with pytest.raises(InputError):
        generate(random_model(tiny_config(), dtype=torch.float32), **options)


def test_named_configs_are_read() -> None:
    layers = {model_config(name).num_layers for name in model_names()}
    assert layers >= {62, 56, 52, 12, 72, 60, 88, 42, 10}
